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
    "factorize dense --experts 3 --shared 1 --active 1",
    "shrink dense --ffn 50%",
    "shrink dense --blocks 1",
    "shrink mixture --experts 50%",
    "activations dense --sparsity 0.5",
    "quantize dense --bits 4",
    "tune factorized --steps 2",
]


@pytest.fixture
def asked(tmp_path: Path) -> Callable[[str], list[str]]:
    """A command line: `asked("shrink dense --ffn 50%")`."""
    ids = torch.randint(3, 64, (16, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "tokens.safetensors")
    tokens, dense = str(tmp_path / "tokens.safetensors"), tmp_path / "dense"
    save_random(tiny_config("llama"), dense)

    def command(case: str) -> list[str]:
        verb, model, *flags = case.split()
        if model == "mixture":
            save_random(tiny_config("qwen3_moe"), tmp_path / "mixture")
        if model == "factorized":
            layout = {"experts": 3, "shared": 1, "active": 1, "router_steps": 2}
            llmsparse.factorize(model=str(dense), output=str(tmp_path / model), calibration=tokens, **layout)
        text = ["--text", tokens, "--teacher", str(dense)] if verb == "tune" else ["--calibration", tokens]
        return [verb, str(tmp_path / model), "-o", str(tmp_path / "out"), *text, "--batch-size", "4", *flags]

    return command


@pytest.mark.parametrize("case", VERBS)
def test_every_verb_says_what_each_process_will_hold(
    case: str, asked: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked(case), "--dry-run", "--processes", "4"]) == 0
    assert " in each of 4 processes" in capsys.readouterr().out


def test_processes_that_would_have_nothing_to_do_are_told(
    asked: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = asked("tune factorized --steps 2")
    for size, told in ((4, False), (6, True)):
        assert main([*command, "--dry-run", "--processes", str(size)]) == 0
        assert ("a step has 4 parts, so 2 of 6 processes have none" in capsys.readouterr().out) == told


def test_so_many_processes_are_no_option_of_a_run(
    asked: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked("shrink dense --ffn 50%"), "--processes", "4"]) == 2
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
    _, model, *_ = asked("shrink dense --ffn 50%")
    keys: dict[str, Any] = {"calibration": str(tmp_path / "tokens.safetensors"), "output": str(tmp_path / "out")}
    with Run(llmsparse.plan(llmsparse.ShrinkRecipe(model=model, ffn="50%", **keys))) as run:
        run.made_so_far()
        shutil.rmtree(run.folder)
        with pytest.raises(
            MachineError, match=r"written by rank 0, not seen here; give an --output that all nodes share"
        ):
            run.made_so_far()
