"""What a process of several takes of a packed weight is those rows and columns, and together they are the weight."""

from __future__ import annotations

import pytest
import torch

from llmsparse.errors import CheckpointError
from llmsparse.formats import PackedTensor
from llmsparse.formats.bitmask import Bitmask
from llmsparse.formats.nested import Nested
from llmsparse.vllm.slicing import cut, share_of


def masked(pattern: str) -> Bitmask:
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    keep = torch.arange(32) % 4 < 2
    return Bitmask.pack(weight.masked_fill(~keep, 0.0), pattern)


def few_bits(group: int) -> Nested:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-2, 3, (12, 32), generator=generator).to(torch.int8)
    steps = (1 + torch.rand(12, 32 // group, generator=generator)).to(torch.bfloat16)
    return Nested.encode(q, steps, torch.bfloat16)


@pytest.mark.parametrize("packed", [masked("unstructured"), masked("2:4"), few_bits(8), few_bits(32)])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_shares_make_the_weight(packed: PackedTensor, processes: int) -> None:
    whole, (out, width) = packed.unpack(), packed.shape
    rows = [share_of(out, out // processes, rank, processes) for rank in range(processes)]
    columns = [share_of(width, width // processes, rank, processes) for rank in range(processes)]
    by_rows = [cut("w", packed, share, slice(0, width)) for share in rows]
    by_columns = [cut("w", packed, slice(0, out), share) for share in columns]
    assert torch.equal(torch.cat([part.unpack() for part in by_rows]), whole)
    assert torch.equal(torch.cat([part.unpack() for part in by_columns], dim=1), whole)
    assert {part.pattern for part in (*by_rows, *by_columns)} == {packed.pattern}


def test_more_processes_than_heads_of_keys_hold_the_same() -> None:
    assert [share_of(8, 4, rank, 4) for rank in range(4)] == [slice(0, 4)] * 2 + [slice(4, 8)] * 2


def test_a_group_of_a_pattern_that_is_divided_is_unstructured() -> None:
    part = cut("w", masked("2:4"), slice(0, 12), slice(6, 12))
    assert part.pattern == "unstructured" and torch.equal(part.unpack(), masked("2:4").unpack()[:, 6:12])


def test_columns_of_a_step_are_not_divided() -> None:
    with pytest.raises(CheckpointError, match="w: 16 columns share a step, and a process would take columns 8 to 16"):
        cut("w", few_bits(16), slice(0, 12), slice(8, 16))
