"""Packed checkpoints in vLLM: a plugin that vLLM finds by its entry point, and that nothing else needs vLLM for."""
