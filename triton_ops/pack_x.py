"""x in the order of the sparse tensor core's registers, for more than 8 tokens: each fragment is read by many warps, and
so is worth a small kernel that turns 32 loads of 4 bytes into 8 of 16."""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def pack_x(x: Tensor, tokens: int, blocks: int) -> Tensor:
    """x (M, K) → int32 (tokens, blocks · 8, 32, 4), as `reference.pack_x`; 0 beyond M and K."""
    fragments = x.new_empty(tokens, blocks * 8, 32, 4, dtype=torch.int32)
    pack_x_kernel[(blocks, tokens)](x, fragments, *x.shape, blocks, enable_fp_fusion=True)
    return fragments


@triton.jit
def pack_x_kernel(x, fragments, M, K, blocks):
    block, tile = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, 1024)  # words of eight fragments
    register, lane, inner = at % 4, at // 4 % 32, at // 128
    token = tile * 8 + lane // 4
    word = block * 128 + inner * 16 + register * 4 + lane % 4  # of a row of x
    words = x.to(tl.pointer_type(tl.int32)) + token * (K // 2) + word
    read = tl.load(words, mask=(token < M) & (word < K // 2), other=0)
    tl.store(fragments + (tile * blocks + block) * 1024 + at, read)
