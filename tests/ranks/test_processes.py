"""Real processes over gloo: whatever their number, the same bytes; and none is left alone with what another ends in."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from forked import Forked

from tests.result_files import files

METHODS = {
    "magnitude": ["--sparsity", "0.5", "--method", "magnitude", "--match-steps", "0"],
    "wanda": ["--method", "wanda", "--pattern", "2:4", "--match-steps", "0"],
    "sparsegpt": ["--sparsity", "0.6", "--method", "sparsegpt", "--match-steps", "0"],
    "alps": ["--sparsity", "0.6", "--method", "alps", "--match-steps", "0"],
    "matched": ["--sparsity", "0.6", "--method", "sparsegpt", "--match-steps", "6"],
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
        one, several = (files(outs[number][name]) for number in outs)
        assert one.keys() == several.keys()
        for file in one:
            if file.endswith(".safetensors"):
                assert one[file] == several[file], (name, file)
