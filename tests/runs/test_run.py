"""What a run does with what is being written while it ends in some other way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sign_verb
from torch import Tensor

from llmsparse.errors import MachineError
from llmsparse.runs.run import Run
from llmsparse.storage.checkpoint import CheckpointWriter


@pytest.fixture
def recipe(tiny_llama: Callable[..., Path], tmp_path: Path, text: str) -> sign_verb.SignRecipe:
    (tmp_path / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    model = tiny_llama(tmp_path / "model", layers=3)
    keys: dict[str, Any] = {"calibration_samples": 4, "seq_len": 16, "device": "cpu"}
    notes, out = str(tmp_path / "notes.txt"), str(tmp_path / "out")
    return sign_verb.SignRecipe(model=str(model), calibration=notes, output=out, **keys)


class FullDisk:
    """A disk that takes what is copied, and no block after the first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks, self.write = 0, CheckpointWriter.write
        monkeypatch.setattr(CheckpointWriter, "write", lambda writer, tensors: self(writer, tensors))

    def __call__(self, writer: CheckpointWriter, tensors: dict[str, Tensor]) -> None:
        self.blocks += bool(tensors)
        if self.blocks > 1:
            raise MachineError("disk full")
        self.write(writer, tensors)


def test_a_disk_that_fails_behind_the_work_ends_the_run_and_leaves_it_to_be_resumed(
    recipe: sign_verb.SignRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        FullDisk(patched)
        with pytest.raises(MachineError, match="disk full"):
            sign_verb.sign(recipe)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.lock").exists()
    sign_verb.sign(recipe, resume=True)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_error_beside_a_failed_write_tells_of_both(
    recipe: sign_verb.SignRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch)
    plan = sign_verb.make_plan(recipe)
    with pytest.raises(KeyboardInterrupt) as caught, Run(plan) as run:
        run.copy_the_rest()
        for number, block in enumerate(run.blocks()):
            run.block(block.name, sign_verb.Signed, lambda block=block: sign_verb.signed(block))
            if number == 1:
                raise KeyboardInterrupt
    assert any("disk full" in note for note in caught.value.__notes__)


def test_a_run_that_is_planned_and_never_begun_locks_nothing(recipe: sign_verb.SignRecipe, tmp_path: Path) -> None:
    Run(sign_verb.make_plan(recipe))
    assert not list(tmp_path.glob("out*"))
    sign_verb.sign(recipe)
