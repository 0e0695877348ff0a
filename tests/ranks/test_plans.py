"""What a run would take in each of several processes, before they are started."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_random, tiny_config
from safetensors.torch import save_file

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import MachineError
from llmsparse.runs.run import Run

VERBS = [
    "factorize --experts 3 --shared 1 --active 1",
    "shrink --ffn 50%",
    "activations --sparsity 0.5",
    "quantize --bits 4",
]


@pytest.fixture
def asked(tmp_path: Path) -> Callable[[str], list[str]]:
    """A command line: `asked("shrink --ffn 50%")`."""
    model = save_random(tiny_config("llama"), tmp_path / "model")
    ids = torch.randint(3, 64, (16, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "tokens.safetensors")
    windows = ["--calibration", str(tmp_path / "tokens.safetensors"), "--batch-size", "2", "-o", str(tmp_path / "out")]

    def command(case: str) -> list[str]:
        verb, *flags = case.split()
        return [verb, str(model), *flags, *windows]

    return command


@pytest.mark.parametrize("case", VERBS)
def test_every_verb_says_what_each_process_will_hold(
    case: str, asked: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked(case), "--dry-run", "--processes", "4"]) == 0
    assert " in each of 4 processes" in capsys.readouterr().out


def test_so_many_processes_are_no_option_of_a_run(
    asked: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked("shrink --ffn 50%"), "--processes", "4"]) == 2
    assert capsys.readouterr().err.startswith("error: --processes 4: is about a plan; add --dry-run")
    assert not (tmp_path / "out").exists()


def test_calibration_that_is_shared_is_held_in_parts(tmp_path: Path) -> None:
    model = save_random(tiny_config("llama"), tmp_path / "model")
    save_file({"input_ids": torch.randint(3, 64, (4096, 64))}, tmp_path / "tokens.safetensors")
    keys: dict[str, Any] = {"calibration": str(tmp_path / "tokens.safetensors"), "calibration_samples": 4000}
    keys |= {"model": str(model), "output": str(tmp_path / "out"), "batch_size": 16}
    for recipe in (
        llmsparse.ShrinkRecipe(**keys, ffn="50%"),
        llmsparse.FactorizeRecipe(**keys, experts=3, shared=1, active=1),
    ):
        plan = llmsparse.plan(recipe)
        one, two, four = (plan.of_processes(size).memory_bytes() for size in (1, 2, 4))
        held = 4000 * 64 * 32 * 4  # of one stream
        assert one - two > 0.9 * held / 2 and two - four > 0.9 * held / 4


def test_a_node_that_does_not_see_what_is_written_is_one_line(
    asked: Callable[[str], list[str]], tmp_path: Path
) -> None:
    _, model, *_ = asked("shrink --ffn 50%")
    keys: dict[str, Any] = {"calibration": str(tmp_path / "tokens.safetensors"), "output": str(tmp_path / "out")}
    with Run(llmsparse.plan(llmsparse.ShrinkRecipe(model=model, ffn="50%", **keys))) as run:
        run.made_so_far()
        shutil.rmtree(run.folder)
        with pytest.raises(
            MachineError, match=r"written by rank 0, not seen here; give an --output that all nodes share"
        ):
            run.made_so_far()
