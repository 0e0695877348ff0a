"""The embedded model, and what there is to see with it."""
