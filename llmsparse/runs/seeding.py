"""A generator for each weight or block: what one draws does not depend on the others."""

from __future__ import annotations

import zlib

import torch


def generator_for(name: str, seed: int) -> torch.Generator:
    """A CPU generator for `name` under `seed`, 0 to 2**63 - 1.

    torch's CPU generator is made from the low 32 bits of a seed alone, so both must reach these: the checksum of the name
    begins with the seed, folded to 32 bits.
    """
    folded = (seed ^ seed >> 32) & 0xFFFFFFFF
    return torch.Generator().manual_seed(zlib.crc32(name.encode(), folded))
