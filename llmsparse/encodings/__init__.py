"""Weights that others have stored in 8 bits and less, read as what they stand for: one file an encoding.

`reader.open_checkpoint` is the way in. What is read is bf16, or whatever dtype the config names; nothing here writes.
"""
