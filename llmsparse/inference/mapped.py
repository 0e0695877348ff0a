"""Tensors that still lie in a mapped file: for the sake of one of them all pages of the file that were read stay resident."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import itertools
from bisect import bisect_right
from pathlib import Path

from torch import Tensor, nn

from llmsparse.backends.cpu import pages
from llmsparse.storage.heap import release_freed


def let_go_of_files(model: nn.Module) -> None:
    """Copy what a model on the CPU still reads from a mapped checkpoint, and nothing else: a tensor that has memory of its
    own would only be there twice for a moment. The copies lie on large pages."""
    files = mapped_files()
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and (files is None or lies_in(files, tensor)):
            tensor.data = pages.copy(tensor.data)
    release_freed()


def mapped_files() -> list[tuple[int, int]] | None:
    """Where files are mapped into this process: [begin, end) of each, in order. None where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found: list[tuple[int, int]] = []
    for line in lines:  # "7f2c…-7f2d… r--p 00000000 08:01 1234  /folder/model.safetensors"
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            begin, _, end = span.partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def lies_in(files: list[tuple[int, int]], tensor: Tensor) -> bool:
    """Whether a tensor's memory begins in one of these."""
    at = tensor.data_ptr()
    nearest = bisect_right(files, (at, 2**64)) - 1
    return nearest >= 0 and files[nearest][0] <= at < files[nearest][1]
