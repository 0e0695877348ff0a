"""Nothing is read behind a buffer, where a page that may not be read follows it; in a process that may crash."""

from __future__ import annotations

import subprocess
import sys

import pytest

GUARDED = """
import contextlib, ctypes, mmap, sys
from dataclasses import replace
import torch
from llmsparse.backends.cpu import CpuWeight, expand, kernels, matvec, nested, prepare
from llmsparse.formats.bitmask import Bitmask
from llmsparse.formats.nested import Nested

libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(tensor):
    "A copy whose last byte is the last one before a page that may not be read."
    size = tensor.nbytes
    if not size:
        return tensor
    pages = -(-size // mmap.PAGESIZE) + 1
    area = mmap.mmap(-1, pages * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    end = (pages - 1) * mmap.PAGESIZE
    copy = torch.frombuffer(area, dtype=torch.uint8, offset=end - size, count=size).view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    assert libc.mprotect(ctypes.c_void_p(start + end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    kept.append(area)
    return copy

@contextlib.contextmanager
def results_guarded():
    "What torch.empty gives is guarded: a product is written there."
    empty = torch.empty
    torch.empty = lambda *shape, **keys: guarded(empty(*shape, **keys))
    yield
    torch.empty = empty

TOKENS = (1, 2, 3, 4, 5, 13)
torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float32):
    for rows, width in ((7, 1), (7, 31), (16, 64), (21, 100), (31, 129), (21, 8300)):
        weight = torch.randn(rows, width).masked_fill_(torch.rand(rows, width) < 0.5, 0).to(dtype)
        weight[-1, -1] = 1  # the last value is at the last place
        packed = Bitmask.pack(weight)
        packed = replace(packed, values=guarded(packed.values), mask=guarded(packed.mask), offsets=guarded(packed.offsets))
        held = prepare(packed)
        assert held.values.numel() == packed.values.numel() + 32
        held = CpuWeight(guarded(held.values), guarded(held.masks), guarded(held.starts), held.shape, held.pattern)
        out = guarded(torch.empty_like(weight))
        for x_dtype in (torch.bfloat16, torch.float32):
            for kernel in kernels(dtype, x_dtype):
                for tokens in TOKENS:
                    x = guarded(torch.randn(tokens, width).to(x_dtype))
                    with results_guarded():
                        matvec(held, x, guarded(torch.randn(rows)), kernel=kernel)
        for kernel in kernels(dtype, dtype):
            assert torch.equal(expand(held, out, kernel=kernel), weight)
        assert torch.equal(held.packed().mask, packed.mask)

for dtype, spread in ((torch.bfloat16, 1.0), (torch.bfloat16, 3.0), (torch.bfloat16, 40.0), (torch.float32, 3.0)):
    for rows, width, group in ((7, 1, 1), (16, 64, 64), (21, 100, 100), (31, 192, 64), (21, 8300, 8300)):
        q = (torch.randn(rows, width) * spread).round().clamp(-127, 127).to(torch.int8)
        q[-1, -1] = 127
        packed = Nested.encode(q, (torch.rand(rows, width // group) + 0.01).to(torch.bfloat16), dtype)
        held = nested.prepare(replace(packed, stream=guarded(packed.stream), steps=guarded(packed.steps)))
        whole = {name: guarded(getattr(held, name)) for name in ("pairs", "counts", "starts", "listed", "steps")}
        whole["list_of"] = [tuple(map(guarded, pair)) for pair in held.list_of]
        held = replace(held, escapes=list(map(guarded, held.escapes)), **whole)
        for int8 in (False, True):
            for kernel in nested.kernels(dtype, dtype, held.wide, int8):
                for tokens in TOKENS:
                    x, bias = guarded(torch.randn(tokens, width).to(dtype)), guarded(torch.randn(rows).to(dtype))
                    with results_guarded():
                        nested.matvec(held, x, bias, int8=int8, kernel=kernel)
        for kernel in nested.kernels(dtype, dtype, held.wide):
            assert torch.equal(nested.expand(held, guarded(torch.empty(rows, width, dtype=dtype)), kernel=kernel), packed.unpack())
        assert torch.equal(held.numbers(), q)
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
