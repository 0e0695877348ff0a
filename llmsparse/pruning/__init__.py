"""The verb `prune`: recipe, plan, pipeline, one block, report."""
