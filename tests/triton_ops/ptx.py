"""What `mma.sp::ordered_metadata.m16n8k32` does to the registers of a warp, lane by lane, as the PTX ISA writes it.

From the chapter "Warp-level matrix instructions: mma.sp"; the order of metadata between the lanes of a quad is a figure
there, and is also CUTLASS's `reorder_meta`. Nothing here is shared with triton_ops: it is what its packing must suit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mma_sp(a: Tensor, b: Tensor, metadata: Tensor, selector: int, dtype: torch.dtype) -> Tensor:
    """a, b int32 (32 lanes, 4 registers), metadata int32 (32,) → A·B (16, 8) in float64.

    A value at an illegal pair of places raises, as the instruction's result would be undefined.
    """
    halves_a = a.contiguous().view(torch.int16).view(dtype).view(32, 8).double()  # a0 … a7 of each lane
    halves_b = b.contiguous().view(torch.int16).view(dtype).view(32, 8).double()  # b0 … b7
    matrix_a = torch.zeros(16, 32, dtype=torch.float64)
    matrix_b = torch.zeros(32, 8, dtype=torch.float64)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            # row = groupID for a0, a1, a4, a5; groupID + 8 for a2, a3, a6, a7
            row = group if i in (0, 1, 4, 5) else group + 8
            # the two of a register are the non-zeros of one group of four columns: threadID, then 4 further groups on
            four = thread if i < 4 else thread + 4
            matrix_a[row, 4 * four + _place(metadata, selector, row, four, i % 2)] = halves_a[lane, i]
            # row = threadID·2 + (i & 1), + 8 for every further register; col = groupID
            matrix_b[2 * thread + i % 2 + 8 * (i // 2), group] = halves_b[lane, i]
    return matrix_a @ matrix_b


def _place(metadata: Tensor, selector: int, row: int, four: int, which: int) -> int:
    """The column within its group of four, of value `which` of group `four` of a row."""
    lane = 4 * (row % 8) + 2 * selector + four // 4  # the selector names a pair of lanes in each quad
    nibble = int(metadata[lane]) >> (16 * (row // 8) + 4 * (four % 4)) & 15
    first, second = nibble & 3, nibble >> 2
    assert first < second, f"places {first}, {second} of row {row}, group {four} are no ordered pair"
    return (first, second)[which]
