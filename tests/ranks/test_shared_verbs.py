"""The verbs beside `prune`: whatever the number of processes, the same bytes, and any number goes on where one was killed."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from architectures import save_random, tiny_config
from forked import Death, Forked
from safetensors.torch import load_file, save_file

import llmsparse
from tests.result_files import files

Ask = Callable[[str, Path], list[str]]

CASES = {
    "narrower": "shrink dense --ffn 50% --heads 50% --match-steps 2",
    "fewer experts": "shrink mixture --experts 50%",
    "fewer blocks": "shrink dense --blocks 2",
    "tuned": "tune factorized --steps 3 --batch-size 8 --save-every 1",
    "made a mixture": "factorize dense --experts 3 --shared 1 --active 1 --router-steps 10",
}
MORE = {
    "fewer experts in one pass": "shrink mixture --experts 50% --one-pass",
    "narrower without a fit": "shrink mixture --ffn 50% --no-refit",
    "narrower experts": "shrink mixture --experts 50% --ffn 50% --match-steps 2",
    "made a mixture without a fit": "factorize dense --experts 3 --shared 0 --active 1 --router gate-mean --no-refit",
    "tuned in a few numbers": "tune factorized --steps 3 --batch-size 5 --train lora",
    "tuned in bfloat16": "tune factorized --steps 2 --batch-size 8 --dtype bfloat16",
    "routers tuned": "tune factorized --steps 2 --batch-size 8 --train router",
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
        "broken": save_random(tiny_config("llama", num_hidden_layers=4), folder / "broken"),
        "huge": save_random(tiny_config("llama", num_hidden_layers=4), folder / "huge"),
        "mixture": save_random(tiny_config("qwen3_moe"), folder / "mixture"),
    }
    spoil(models["broken"], math.nan)
    spoil(models["huge"], 3e38)
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


def spoil(model: Path, value: float) -> None:
    """Put a number all over a matrix of the second block."""
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors.keys() & {"model.layers.1.self_attn.o_proj.weight"}:
            tensors[name].fill_(value)
            save_file(tensors, file, {"format": "pt"})


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
@pytest.mark.parametrize("name", [*CASES, "inputs left out", "inputs of experts left out"])
def test_one_that_is_killed_ends_the_others_and_any_number_goes_on(
    name: str, forked: Forked, asked: Ask, tmp_path: Path
) -> None:
    out, whole, case = tmp_path / "out", tmp_path / "whole", (CASES | MORE)[name]
    assert [one.code for one in forked.run(1, asked(case, whole))] == [0]
    last = max((Path(asked(case, out)[1])).glob("*.safetensors")).name
    first = (2, 0, "tuning.pt", 2) if name == "tuned" else (4, 0, "journal.jsonl", 3)  # between steps, or blocks
    for size, rank, file, time in (first, (2, 1, last, 2)):
        resume = ["--resume"] if out.with_name("out.partial").exists() else []
        ended = forked.run(size, [*asked(case, out), *resume], die=Death(rank, file, time))
        assert ended[rank].code == -9, ended
        assert [one.code for other, one in enumerate(ended) if other != rank] == [3] * (size - 1), ended
        assert "another process of this run has ended" in ended[1 - rank].err and "--resume" in ended[1 - rank].err
        assert not out.exists() and out.with_name("out.partial").is_dir()
    ended = forked.run(3, [*asked(case, out), "--resume"])
    assert [one.code for one in ended] == [0] * 3, ended
    assert made(out) == made(whole)


def test_a_signal_to_one_process_stops_all_at_one_step(forked: Forked, asked: Ask, tmp_path: Path) -> None:
    """Where it comes as the first one saves, others have begun the next step."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    case = CASES["tuned"]
    ended = forked.run(2, asked(case, out), die=Death(0, "tuning.pt", 1, signal.SIGTERM))
    assert [one.code for one in ended] == [130, 130], ended
    assert ended[0].err.startswith("error: interrupted; ") and ended[1].err == ""
    state = torch.load(tmp_path / "out.partial" / ".llmsparse" / "tuning.pt", weights_only=True)
    assert state["history"]["step"] == 2
    for command in (asked(case, whole), [*asked(case, out), "--resume"]):
        assert [one.code for one in forked.run(2, command)] == [0, 0]
    assert made(out) == made(whole)


@pytest.mark.parametrize(
    "case",
    [
        "shrink broken --ffn 50%",
        "shrink broken --blocks 2",
        "shrink huge --ffn 50%",
        "shrink huge --blocks 2",
        "shrink huge --blocks 2 --score influence",
        "factorize huge --experts 3 --shared 1 --active 1",
        "activations huge --sparsity 0.5",
        "tune factorized --steps 3 --batch-size 8 --teacher huge",
    ],
)
def test_what_all_end_in_the_first_says_in_one_line(case: str, forked: Forked, asked: Ask, tmp_path: Path) -> None:
    huge = asked("shrink huge", tmp_path)[1]
    command = [huge if word == "huge" else word for word in asked(case, tmp_path / "out")]
    first, second = forked.run(2, command)
    assert first.code == second.code in (1, 2), (first, second)
    assert first.err.startswith("error: ") and first.err.count("\n") == 1 and "nan" in first.err.lower(), first
    assert second.err == "", second


def test_what_one_ends_in_all_do_and_the_first_says_who(forked: Forked, tmp_path: Path) -> None:
    """Of two processes the second one has the last window, whose last token is so large that what attention adds to it makes
    it infinite."""
    model = save_random(tiny_config("llama"), tmp_path / "model")
    largest = torch.finfo(torch.float32).max
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors.keys() & {"model.embed_tokens.weight"}:
            tensors[name][63, ::2], tensors[name][63, 1::2] = largest, -largest
        for name in tensors.keys() & {"model.layers.0.self_attn.o_proj.weight"}:
            tensors[name].fill_(1e36)
        save_file(tensors, file, {"format": "pt"})
    ids = torch.randint(3, 63, (24, 16), generator=torch.Generator().manual_seed(0))
    ids[-1, -1] = 63
    save_file({"input_ids": ids}, tmp_path / "tokens.safetensors")
    windows = [
        "--calibration",
        str(tmp_path / "tokens.safetensors"),
        "--calibration-samples",
        "24",
        "--batch-size",
        "2",
    ]
    layout = ["--experts", "3", "--shared", "1", "--active", "1"]
    first, second = forked.run(2, ["factorize", str(model), "-o", str(tmp_path / "out"), *windows, *layout])
    assert (first.code, second.code, second.err) == (1, 1, ""), (first, second)
    assert first.err.startswith("error: rank 1: the activations that enter the FFN of ") and first.err.count("\n") == 1
