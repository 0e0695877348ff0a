"""A generator for each weight or block: what one draws does not depend on the others."""

from __future__ import annotations

import zlib

import torch


def generator_for(name: str, seed: int) -> torch.Generator:
    """A CPU generator for `name`; any `seed` from 0 to 2**63 - 1.

    torch's CPU generator takes its state from the low 32 bits alone: the name decides what is drawn, whatever the seed.
    """
    return torch.Generator().manual_seed((seed * 2**32 + zlib.crc32(name.encode())) % 2**64)
