"""Nothing is read behind a buffer, where a page that may not be read follows it; in a process that may crash."""

from __future__ import annotations

import subprocess
import sys

import pytest

GUARDED = """
import ctypes, mmap, sys
from dataclasses import replace
import torch
from llmsparse.backends.cpu import CpuWeight, expand, kernels, matvec, prepare
from llmsparse.formats.bitmask import Bitmask

libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(tensor):
    "A copy whose last byte is the last one before a page that may not be read."
    size = tensor.nbytes
    pages = -(-size // mmap.PAGESIZE) + 1
    area = mmap.mmap(-1, pages * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    end = (pages - 1) * mmap.PAGESIZE
    copy = torch.frombuffer(area, dtype=torch.uint8, offset=end - size, count=size).view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    assert libc.mprotect(ctypes.c_void_p(start + end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    kept.append(area)
    return copy

torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float32):
    for width in (1, 31, 64, 100, 129):
        weight = torch.randn(7, width).masked_fill_(torch.rand(7, width) < 0.5, 0).to(dtype)
        weight[-1, -1] = 1  # the last value is at the last place
        packed = Bitmask.pack(weight)
        packed = replace(packed, values=guarded(packed.values), mask=guarded(packed.mask), offsets=guarded(packed.offsets))
        held = prepare(packed)
        assert held.values.numel() == packed.values.numel() + 32
        held = CpuWeight(guarded(held.values), guarded(held.masks), guarded(held.starts), held.shape, held.pattern)
        out = guarded(torch.empty_like(weight))
        for x_dtype in (torch.bfloat16, torch.float32):
            for kernel in kernels(dtype, x_dtype):
                for rows in (1, 2, 3, 4, 5, 13):
                    matvec(held, guarded(torch.randn(rows, width).to(x_dtype)), guarded(torch.randn(7)), kernel=kernel)
        for kernel in kernels(dtype, dtype):
            assert torch.equal(expand(held, out, kernel=kernel), weight)
        assert torch.equal(held.packed().mask, packed.mask)
print("whole")
if len(sys.argv) > 1:
    bytes_behind = torch.frombuffer(kept[-1], dtype=torch.uint8)[-1].item()
"""


@pytest.mark.parametrize("crash", [False, True])
def test_nothing_is_read_behind_a_buffer(crash: bool) -> None:
    command = [sys.executable, "-c", GUARDED, *(["crash"] if crash else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "whole\n", done.stderr
    assert (done.returncode != 0) == crash  # the page is really guarded
