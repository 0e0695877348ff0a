"""A causal language model as a stream of blocks, described by itself."""
