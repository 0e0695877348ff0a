"""A checkpoint without its zeros, and back, bit for bit."""
