"""accelerate remembers one state for a whole process; a tuning within a program of its own leaves that program's alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

import llmsparse
from llmsparse.errors import NumericalError
from llmsparse.tuning.accelerate_state import accelerate_set_aside


@pytest.fixture
def callers() -> Iterator[Accelerator]:
    with accelerate_set_aside():  # of the tests themselves
        yield Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)


def what_it_says(accelerator: Accelerator) -> tuple[Any, ...]:
    says = accelerator.mixed_precision, accelerator.gradient_accumulation_steps, accelerator.sync_gradients
    return (*says, str(accelerator.device))


def test_a_callers_accelerator_is_as_it_was_behind_a_tuning(
    callers: Accelerator, moe: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    before = what_it_says(callers)
    assert before == ("bf16", 3, True, "cpu")
    llmsparse.tune(model=str(moe), output=str(tmp_path / "out"), **keys | {"steps": 2})
    assert what_it_says(callers) == before


def test_so_it_is_behind_one_that_fails(callers: Accelerator, moe: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    before = what_it_says(callers)
    with pytest.raises(NumericalError):
        llmsparse.tune(model=str(moe), output=str(tmp_path / "out"), **keys | {"layer_weight": 1e39})
    assert what_it_says(callers) == before
