"""A block of SparseGPT in one launch is the loop over its columns."""

from __future__ import annotations

import pytest
import torch
from aot import Compiler
from torch import Tensor

from triton_ops import reference
from triton_ops.absorb import absorb, absorb_groups


def problem(columns: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """entering, weight, m, scale."""
    generator = torch.Generator().manual_seed(columns * 1000 + rows)
    entering, weight = (torch.randn(columns, rows, generator=generator) for _ in range(2))
    m = torch.randn(columns, columns, generator=generator).tril(-1) / columns**0.5 + torch.eye(columns)
    scale = torch.rand(columns, generator=generator) + 0.5
    return tuple(tensor.to(device) for tensor in (entering, weight, m, scale))  # pyright: ignore[reportReturnType]


def test_by_hand(device: torch.device) -> None:
    """Column 0 goes: it loses 2, of which half reaches column 1, which stays, and loses −(0 + 0.5·2) + 3."""
    weight = torch.tensor([[2.0], [3.0]], device=device)
    m = torch.tensor([[1.0, 0.0], [0.5, 1.0]], device=device)
    lost = absorb(torch.zeros_like(weight), weight, m, torch.tensor([[False], [True]], device=device))
    assert lost.flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (20, 3), (64, 40), (128, 17)])
def test_a_given_mask(columns: int, rows: int, device: torch.device) -> None:
    entering, weight, m, _ = problem(columns, rows, device)
    keep = torch.rand(columns, rows, generator=torch.Generator().manual_seed(0)).to(device) > 0.5
    torch.testing.assert_close(absorb(entering, weight, m, keep), reference.absorb(entering, weight, m, keep))


@pytest.mark.parametrize(("n", "of"), [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize(("columns", "rows"), [(8, 1), (24, 5), (128, 18)])
def test_groups_find_their_mask_on_the_way(n: int, of: int, columns: int, rows: int, device: torch.device) -> None:
    entering, weight, m, scale = problem(columns, rows, device)
    lost, keep = absorb_groups(entering, weight, m, scale, n, of)
    wanted, mask = reference.absorb_groups(entering, weight, m, scale, n, of)
    assert torch.equal(keep, mask) and (keep.view(-1, of, rows).sum(1) == n).all()
    torch.testing.assert_close(lost, wanted)


def test_of_equal_scores_the_later_ones_stay(device: torch.device) -> None:
    weight = torch.ones(4, 1, device=device)
    eye = torch.eye(4, device=device)
    _, keep = absorb_groups(torch.zeros_like(weight), weight, eye, torch.ones(4, device=device), 2, 4)
    assert keep.flatten().tolist() == [False, False, True, True]


@pytest.mark.parametrize(("columns", "of"), [(129, 1), (6, 4)])
def test_what_does_not_fit_is_refused(columns: int, of: int, device: torch.device) -> None:
    entering, weight, m, scale = problem(columns, 2, device)
    with pytest.raises(ValueError, match=f"at most 128 columns in groups of {of}, got {columns}"):
        absorb_groups(entering, weight, m, scale, 1, of)


@pytest.mark.parametrize(("n", "of"), [(1, 1), (2, 4)])
def test_a_warp_holds_its_rows_in_registers(n: int, of: int, compiled: Compiler) -> None:
    pointers = dict.fromkeys(("entering", "weight", "m", "scale", "lost"), "*fp32")
    made = compiled(
        kernel="triton_ops.absorb:_absorb",
        signature=pointers | {"keep": "*i8", "rows": "i32", "columns": "i32"},
        constants={"N": n, "M": of, "ROWS": 4, "COLUMNS": 128},
        cc=90,
        warps=1,
    )
    assert made.stack == 0 and made.registers <= 168
