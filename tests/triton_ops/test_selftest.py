from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from triton_ops import mma24, selftest
from triton_ops.selftest import KERNELS, first_right, wrong


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(selftest, "SHAPE", (20, 516))  # the interpreter takes its time
    wrong.cache_clear()
    yield
    wrong.cache_clear()


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_right_here(device: torch.device, name: str) -> None:
    assert wrong(name, device) is None


def test_metadata_in_another_order_is_noticed_and_the_next_kernel_taken(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = mma24.prepare
    monkeypatch.setattr(mma24, "prepare", lambda weight: _turned(right(weight)))
    name, refused = first_right(("mma24", "join24"), device)
    assert name == "join24"
    assert refused["mma24"].startswith(f"mma24 is wrong on {device}: error ")


def _turned(packed: mma24.Fragments24) -> mma24.Fragments24:
    """As if the instruction read the other pair of lanes in each quad."""
    lanes = torch.arange(32, device=packed.meta.device)
    return packed._replace(meta=packed.meta[:, :, lanes ^ 2].contiguous())


def test_a_kernel_that_fails_says_how(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(mma24, "linear", broken)
    assert first_right(("mma24",), device) == (
        None,
        {"mma24": f"mma24 fails on {device}: RuntimeError: no kernel image"},
    )
