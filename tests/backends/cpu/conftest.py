"""Outputs hold NaN until they are written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmsparse.backends.cpu import why_not

if reason := why_not():
    pytest.skip(f"no CPU kernels here: {reason}", allow_module_level=True)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Whatever `torch.empty` gives is NaN, so that an output that was not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
