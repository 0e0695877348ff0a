"""Packed and fused layers inside transformers, and the ways to run them. Empty: `--help` must not load torch."""
