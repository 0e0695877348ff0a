"""Masks of a bit a place: bit c % 8 of byte c // 8 of a row is its column c. Counting, spreading, and N:M."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmsparse.sparsity.patterns import NofM, parse_pattern

SET_BITS = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)  # of each byte


def nofm(pattern: str) -> NofM | None:
    """N and M of `N:M`, None for `unstructured`."""
    if pattern == "unstructured":
        return None
    parsed = parse_pattern(pattern, None, "row")
    assert isinstance(parsed, NofM)
    return parsed


def _lookup(table: Tensor, mask: Tensor) -> Tensor:
    """table[byte] for every byte of a mask."""
    if mask.device.type == "cpu":
        return torch.from_numpy(table.numpy()[mask.numpy()])
    return table.to(mask.device)[mask.int()]


def set_bits(mask: Tensor) -> Tensor:
    """How many places each row of a mask (rows, ⌈in/8⌉) keeps: int64 (rows,)."""
    if mask.device.type == "cpu":
        bits: Any = mask.numpy()
        words = bits.view(np.uint64) if bits.shape[1] % 8 == 0 else bits
        return torch.from_numpy(np.bitwise_count(words).sum(axis=1, dtype=np.int64))
    return _lookup(SET_BITS, mask).sum(-1, dtype=torch.int64)


def obeys(mask: Tensor, width: int, group: NofM, exactly: bool = False) -> bool:
    """Every group of a mask (rows, ⌈in/8⌉) keeps at most N places of M; or `exactly` N."""
    if width % 8 == 0 and 8 % group.m == 0:
        return bool(_lookup(_bytes_of(group, exactly), mask).all())
    kept = bits_of(mask, width).view(torch.uint8).reshape(len(mask), width // group.m, group.m).sum(-1)
    return bool((kept == group.n if exactly else kept <= group.n).all())


@cache
def _bytes_of(group: NofM, exactly: bool) -> Tensor:
    """bool (256,): the bytes of a mask whose groups all obey N:M."""
    bits = bits_of(torch.arange(256, dtype=torch.uint8)[:, None], 8)  # (256, 8)
    kept = bits.view(256, 8 // group.m, group.m).sum(-1)
    return (kept == group.n if exactly else kept <= group.n).all(-1)


def bits_of(mask: Tensor, width: int) -> Tensor:
    """Mask (..., ⌈in/8⌉) → bool (..., in)."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.view(torch.bool).flatten(-2)[..., :width]
