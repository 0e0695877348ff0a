"""The verbs beside `prune`: whatever the number of processes, the same bytes, and any number goes on where one was killed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from architectures import save_random, tiny_config
from forked import Forked
from safetensors.torch import save_file

import llmsparse
from tests.result_files import files

Ask = Callable[[str, Path], list[str]]

CASES = {
    "narrower": "shrink dense --ffn 50% --heads 50% --match-steps 2",
    "fewer experts": "shrink mixture --experts 50%",
    "fewer blocks": "shrink dense --blocks 2",
    "tuned": "tune factorized --steps 3 --batch-size 8",
    "made a mixture": "factorize dense --experts 3 --shared 1 --active 1 --router-steps 10",
}
MORE = {
    "fewer experts in one pass": "shrink mixture --experts 50% --one-pass",
    "narrower without a fit": "shrink mixture --ffn 50% --no-refit",
    "narrower experts": "shrink mixture --experts 50% --ffn 50% --match-steps 2",
    "made a mixture without a fit": "factorize dense --experts 3 --shared 0 --active 1 --router gate-mean --no-refit",
    "tuned in a few numbers": "tune factorized --steps 3 --batch-size 5 --train lora",
    "inputs left out": "activations dense --sparsity 0.5",
    "inputs of experts left out": "activations mixture --sparsity 0.5 --rule topk --bias fold",
    "fewer blocks by influence": "shrink dense --blocks 2 --score influence --match-steps 2",
}


@pytest.fixture(scope="module")
def forked() -> Generator[Forked]:
    with Forked() as process:
        yield process


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """The command line of a case: `asked("shrink dense --ffn 50%", output)`."""
    folder = tmp_path_factory.mktemp("shared")
    models = {
        "dense": save_random(tiny_config("llama", num_hidden_layers=4), folder / "dense"),
        "mixture": save_random(tiny_config("qwen3_moe"), folder / "mixture"),
    }
    ids = torch.randint(3, 64, (60, 16), generator=torch.Generator().manual_seed(0))
    tokens = folder / "tokens.safetensors"
    save_file({"input_ids": ids}, tokens)
    windows = ["--calibration", str(tokens), "--calibration-samples", "24", "--batch-size", "2"]
    texts = {"tune": ["--teacher", str(models["dense"]), "--text", str(tokens)]}

    def command(case: str, out: Path) -> list[str]:
        verb, model, *flags = case.split()
        if model not in models:
            models[model] = folder / model
            layout = {"experts": 3, "shared": 1, "active": 1, "router_steps": 10}
            llmsparse.factorize(
                model=str(models["dense"]), output=str(models[model]), calibration=str(tokens), **layout
            )
        return [verb, str(models[model]), "-o", str(out), *texts.get(verb, windows), *flags]

    return command


def made(folder: Path) -> dict[str, bytes]:
    """Weights, and what config.json says of them."""
    return {name: data for name, data in files(folder).items() if name.endswith((".safetensors", "config.json"))}


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (2, CASES),
        pytest.param(2, MORE, marks=pytest.mark.slow),
        pytest.param(3, CASES | MORE, marks=pytest.mark.slow),
        pytest.param(4, CASES | MORE, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_makes_the_bytes_of_one(
    size: int, cases: dict[str, str], forked: Forked, asked: Ask, tmp_path: Path
) -> None:
    for number in (1, size):
        ended = forked.run(number, *[asked(case, tmp_path / f"{name} {number}") for name, case in cases.items()])
        assert [one.code for one in ended] == [0] * number, ended
        assert all(one.out == one.err == "" for one in ended[1:]), "the first process speaks"
    for name in cases:
        assert made(tmp_path / f"{name} {size}") == made(tmp_path / f"{name} 1") != {}, name


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_that_is_killed_ends_the_others_and_any_number_goes_on(
    name: str, forked: Forked, asked: Ask, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert [one.code for one in forked.run(1, asked(CASES[name], whole))] == [0]
    last = max((Path(asked(CASES[name], out)[1])).glob("*.safetensors")).name
    for size, rank, file, time in ((4, 0, "journal.jsonl", 3), (2, 1, last, 2)):
        resume = ["--resume"] if out.with_name("out.partial").exists() else []
        ended = forked.run(size, [*asked(CASES[name], out), *resume], die=(rank, file, time))
        assert ended[rank].code == -9, ended
        assert [one.code for other, one in enumerate(ended) if other != rank] == [3] * (size - 1), ended
        assert "another process of this run has ended" in ended[1 - rank].err and "--resume" in ended[1 - rank].err
        assert not out.exists() and out.with_name("out.partial").is_dir()
    ended = forked.run(3, [*asked(CASES[name], out), "--resume"])
    assert [one.code for one in ended] == [0] * 3, ended
    assert made(out) == made(whole)
