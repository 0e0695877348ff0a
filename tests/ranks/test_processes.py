"""Real processes over gloo: whatever their number, the same bytes; and none is left alone with what another ends in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from architectures import save_random, tiny_config
from forked import Death, Forked
from safetensors.torch import load_file, save_file

from llmsparse.cli.app import main
from tests.result_files import files

METHODS = {
    "magnitude": ["--sparsity", "0.5", "--method", "magnitude", "--match-steps", "0"],
    "wanda": ["--method", "wanda", "--pattern", "2:4", "--match-steps", "0"],
    "sparsegpt": ["--sparsity", "0.6", "--method", "sparsegpt", "--match-steps", "0"],
    "alps": ["--sparsity", "0.6", "--method", "alps", "--match-steps", "0"],
    "matched": ["--sparsity", "0.6", "--method", "sparsegpt", "--match-steps", "6"],
    "reordered": ["--pattern", "2:4", "--method", "wanda", "--permute", "auto", "--match-steps", "0"],
    "reordered and matched": ["--pattern", "2:4", "--method", "sparsegpt", "--permute", "auto", "--match-steps", "6"],
}


@pytest.fixture(scope="module")
def forked() -> Generator[Forked]:
    with Forked() as process:
        yield process


@pytest.fixture(scope="module")
def asked(
    tiny_llama: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """A command line: `asked(output, *flags)`."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "notes.txt").write_text(text[:60_000], encoding="utf-8")
    model = tiny_llama(folder / "tiny", layers=2, shards=2)
    windows = ["--calibration", str(folder / "notes.txt"), "--calibration-samples", "24", "--seq-len", "32"]
    return lambda out, *flags: ["prune", str(model), "-o", str(out), *windows, "--batch-size", "2", *flags]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_makes_the_bytes_of_one(
    size: int, forked: Forked, asked: Callable[..., list[str]], tmp_path: Path
) -> None:
    outs = {number: {name: tmp_path / str(number) / name for name in METHODS} for number in (1, size)}
    for number in outs:
        commands = [asked(outs[number][name], *flags) for name, flags in METHODS.items()]
        ended = forked.run(number, *commands)
        assert [one.code for one in ended] == [0] * number, ended
        assert all(one.out == one.err == "" for one in ended[1:]), "the first process speaks"
    for name in METHODS:
        assert tensors(outs[1][name]) == tensors(outs[size][name]), name
    for name in ("reordered", "reordered and matched"):
        report = json.loads((outs[size][name] / "llmsparse_report.json").read_text(encoding="utf-8"))
        assert any(row["after"] > row["before"] for row in report["permuted"]), name


@pytest.mark.slow
def test_a_measurement_and_few_bits_are_shared_too(
    forked: Forked, asked: Callable[..., list[str]], tmp_path: Path
) -> None:
    said: dict[int, tuple[object, ...]] = {}
    for size in (1, 2):
        out = tmp_path / str(size)
        _, model, _, _, *windows = asked(out)
        quantize = ["quantize", model, "-o", str(out), "--bits", "3", *windows]
        measure = ["eval", model, "--text", windows[1], "--seq-len", "32", "--batch-size", "3", "--json"]
        ended = forked.run(size, quantize, measure)
        assert [one.code for one in ended] == [0] * size, ended
        assert all(one.out == one.err == "" for one in ended[1:]), "the first process speaks"
        perplexity = json.loads(ended[0].out[ended[0].out.index("{") :])
        said[size] = perplexity["perplexity"], perplexity["tokens"], tensors(out)
    assert said[1] == said[2]


@pytest.mark.slow
def test_the_sums_of_experts_are_those_of_one_process(forked: Forked, tmp_path: Path) -> None:
    model = save_random(tiny_config("mixtral"), tmp_path / "mixture")
    ids = torch.randint(0, 64, (20, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "tokens.safetensors")
    made: list[bytes] = []
    for size in (1, 2, 3):
        out = tmp_path / f"{size}.safetensors"
        asked = ["scores", str(model), "-o", str(out), "--calibration", str(tmp_path / "tokens.safetensors")]
        ended = forked.run(size, [*asked, "--calibration-samples", "18", "--batch-size", "1"])
        assert [one.code for one in ended] == [0] * size, ended
        made.append(b"".join(tensor.numpy().tobytes() for _, tensor in sorted(load_file(out).items())))
    assert made[0] == made[1] == made[2] != b""


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.endswith(".safetensors")}


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_and_any_number_goes_on(
    forked: Forked, asked: Callable[..., list[str]], tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    flags = ["--sparsity", "0.6", "--match-steps", "2", "--max-shard-size", "40KB"]
    assert [one.code for one in forked.run(1, asked(whole, *flags))] == [0]
    for rank, file in ((1, "model-00002-of-00002.safetensors"), (0, "journal.jsonl")):
        resume = ["--resume"] if out.with_name("out.partial").exists() else []
        ended = forked.run(2, asked(out, *flags, *resume), die=Death(rank, file, 2))
        assert ended[rank].code == -9 and ended[1 - rank].code == 3, ended
        assert re.fullmatch(
            f"error: {'rank 1: ' if rank == 0 else ''}another process of this run has ended, .* --resume\n",
            ended[1 - rank].err,
        )
        assert not out.exists() and out.with_name("out.partial").is_dir()
    assert [one.code for one in forked.run(1, asked(out, *flags, "--resume"))] == [0]
    assert tensors(out) == tensors(whole)


def test_what_every_process_finds_wrong_the_first_says(
    forked: Forked, asked: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for command in (asked(tmp_path / "full", "--sparsity", "0.5"), asked(tmp_path / "out", "--sparsity", "5")):
        first, second = forked.run(2, command)
        assert (first.code, second.code) == (2, 2) and first.err.count("\n") == 1 and not second.err, (first, second)
    assert not (tmp_path / "out").exists()


def test_processes_that_would_do_different_things_are_one_line(
    forked: Forked, asked: Callable[..., list[str]], tmp_path: Path
) -> None:
    one, other = (asked(tmp_path / "out", "--sparsity", sparsity) for sparsity in ("0.5", "0.6"))
    first, second = forked.run_each([[one], [other]])
    assert (first.code, second.code, second.err) == (2, 2, "")
    assert re.fullmatch(
        r"error: rank 1: differs from rank 0 in recipe \(.*sparsity.*\); give all nodes .*\n", first.err
    )
    assert not list(tmp_path.iterdir())


def test_a_process_without_its_peers_is_one_line(
    forked: Forked, asked: Callable[..., list[str]], tmp_path: Path
) -> None:
    command = asked(tmp_path / "out", "--sparsity", "0.5")
    for rank in (0, 1):
        commands = [[command], []] if rank == 0 else [[], [command]]
        ended = forked.run_each(commands, LLMSPARSE_JOIN_SECONDS="2")[rank]
        assert ended.code == 3
        assert re.fullmatch(r"error: (rank 1: )?waited 2 s at 127\.0\.0\.1:\d+ for 1 other processes.*\n", ended.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many': wanted a whole number of at least 1"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK 2 of WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
    ],
)
def test_an_environment_that_is_no_place_is_one_line(
    environment: dict[str, str],
    said: str,
    asked: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(asked(tmp_path / "out", "--sparsity", "0.5")) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_what_one_process_does_by_itself_is_refused_to_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["inspect", "builtin"]) == 2
    assert capsys.readouterr().err == "error: 2 processes cannot share this work; start it without torchrun, in one\n"
