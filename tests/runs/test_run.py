"""What a run does with what is being written while it ends in some other way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sign_verb
from torch import Tensor

from llmsparse.errors import CheckpointError, MachineError, RecipeError
from llmsparse.runs.partial import STATE_FOLDER
from llmsparse.runs.run import Run
from llmsparse.runs.written import CHECKSUMS
from llmsparse.storage.checkpoint import CheckpointReader, CheckpointWriter


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


def journaled(out: Path) -> tuple[Path, list[dict[str, Any]]]:
    journal = out.with_name(out.name + ".partial") / STATE_FOLDER / "journal.jsonl"
    return journal, [json.loads(line) for line in journal.read_text().splitlines()]


@pytest.fixture
def interrupted(recipe: sign_verb.SignRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What is left of a run that ended after its first block."""
    with monkeypatch.context() as patched, pytest.raises(MachineError):
        FullDisk(patched)
        sign_verb.sign(recipe)
    return tmp_path / "out.partial"


def test_a_bit_that_flips_in_what_was_only_copied_is_found(recipe: sign_verb.SignRecipe, interrupted: Path) -> None:
    spec = CheckpointReader(interrupted).spec("model.embed_tokens.weight")
    with spec.file.open("r+b") as stream:
        stream.seek(spec.end - 1)
        byte = stream.read(1)[0]
        stream.seek(spec.end - 1)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(MachineError, match=r"model\.embed_tokens\.weight does not read back as it was written"):
        sign_verb.sign(recipe, resume=True)
    assert not interrupted.with_name("out").exists()


def test_a_block_that_the_journal_notes_with_the_checksums_of_another_is_not_taken_for_made(
    recipe: sign_verb.SignRecipe, interrupted: Path
) -> None:
    journal, notes = journaled(interrupted.with_name("out"))
    journal.write_text("".join(json.dumps(note) + "\n" for note in [*notes, notes[-1] | {"block": "model.layers.2"}]))
    with pytest.raises(CheckpointError, match=r"tensors are missing, .* model\.layers\.2\."):
        sign_verb.sign(recipe, resume=True)
    assert not interrupted.with_name("out").exists()


@pytest.mark.parametrize("sums", [None, {}, "x"])
def test_a_block_that_the_journal_notes_without_checksums_is_refused(
    sums: Any, recipe: sign_verb.SignRecipe, interrupted: Path
) -> None:
    journal, notes = journaled(interrupted.with_name("out"))
    notes[-1]["entry"][CHECKSUMS] = sums
    journal.write_text("".join(json.dumps(note) + "\n" for note in notes))
    with pytest.raises(
        RecipeError, match=r"another version .* noted of model\.layers\.0 .* start again with --overwrite"
    ):
        sign_verb.sign(recipe, resume=True)


def test_a_run_that_is_planned_and_never_begun_locks_nothing(recipe: sign_verb.SignRecipe, tmp_path: Path) -> None:
    Run(sign_verb.make_plan(recipe))
    assert not list(tmp_path.glob("out*"))
    sign_verb.sign(recipe)
