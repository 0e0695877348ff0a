"""The layouts of triton_ops/reference.py, by hand and against the tables of the PTX ISA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ptx import mma_sp
from torch import Tensor

from triton_ops import reference

CPU = torch.device("cpu")


def test_a_mask_keeps_the_two_largest_and_of_equals_the_left() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 2.0, 2.0, -2.0, 2.0]], dtype=torch.bfloat16)
    assert reference.mask24(weight).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]


def test_a_group_with_fewer_survivors_gets_its_lowest_free_places() -> None:
    keep = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1]]).bool()
    assert reference.fill24(keep).int().tolist() == [[1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1]]


def test_a_row_is_pairs_of_values_and_a_nibble_for_their_places() -> None:
    weight = torch.zeros(1, 32, dtype=torch.float16)
    weight[0, [1, 3, 4, 31]] = torch.tensor([5.0, 6.0, 7.0, 8.0], dtype=torch.float16)
    values, places = reference.rows24(weight, reference.stored(weight))
    assert values.tolist() == [[5, 6, 7, 0, *[0] * 10, 0, 8]]
    nibbles = [places.item() >> 4 * group & 15 for group in range(8)]
    assert nibbles == [1 | 3 << 2, 0 | 1 << 2, *[0 | 1 << 2] * 5, 0 | 3 << 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_come_back_to_the_bit(sparse: Callable[..., Tensor], dtype: torch.dtype) -> None:
    weight = sparse(24, 96, dtype, CPU)
    back = reference.dense24(*reference.rows24(weight, reference.stored(weight)))
    assert torch.equal(back.view(torch.int16), weight.view(torch.int16))


def test_fragments_fed_to_the_instruction_give_the_product(sparse: Callable[..., Tensor]) -> None:
    weight = sparse(32, 512, torch.bfloat16, CPU)
    x = torch.randn(11, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    vals, meta = reference.pack24(weight, reference.stored(weight))
    fragments = reference.pack_x(x)  # (2, K/32, 32, 4)
    y = torch.zeros(16, 32, dtype=torch.float64)
    for row in range(2):
        for tokens in range(2):
            for tile in range(512 // 32):
                words = meta[row, tile // 8, :, tile % 8 // 2]
                product = mma_sp(vals[row, tile], fragments[tokens, tile], words, tile % 2, torch.bfloat16)
                y[8 * tokens : 8 * tokens + 8, 16 * row : 16 * row + 16] += product.T
    assert torch.equal(y[:11].bfloat16(), reference.linear(x, weight))
    assert not y[11:].any()


def test_a_split_weight_adds_up_to_the_bit(sparse: Callable[..., Tensor]) -> None:
    weight = sparse(16, 256, torch.bfloat16, CPU, sparsity=0.7)
    two, rest = reference.split24(weight)
    assert torch.equal(two.view(torch.int16) + rest.view(torch.int16), weight.view(torch.int16))
    assert reference.stored(two).view(16, 64, 4).sum(-1).max() == 2
    assert 0 < reference.stored(rest).sum() < 0.05 * weight.numel()
