"""From a run's seed to a generator for each weight or block: what one draws does not depend on the others."""

from __future__ import annotations

import zlib

import torch


def generator_for(name: str, seed: int) -> torch.Generator:
    """A CPU generator for `name`; `seed` from 0 to 2**63 - 1, of which torch takes 64 bits together with the name."""
    high, low = divmod(seed, 2**32)
    return torch.Generator().manual_seed((low * 2**32 + high + zlib.crc32(name.encode())) % 2**64)
