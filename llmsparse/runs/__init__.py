"""What every run shares: recipe, plan, partial output and its journal, report, progress."""
