"""Patterns, which say what is kept, and statistics, which say what matters."""
