"""A smaller model of the same kind: fewer experts, fewer blocks, narrower FFNs and attention."""
