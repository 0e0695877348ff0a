"""Perplexity, streamed block by block."""
