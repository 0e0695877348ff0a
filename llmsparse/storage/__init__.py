"""Safetensors in and out, tensor by tensor; writes that survive a power cut."""
