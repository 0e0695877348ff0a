"""Text → windows of token ids."""
