"""A perplexity is a number, or an error says why there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import NumericalError

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def loud(tiny_llama: Build, tmp_path_factory: pytest.TempPathFactory, text: str) -> tuple[Path, Path]:
    """A model whose FFN passes what float16 holds, and comes back: fine in float32."""
    folder = tmp_path_factory.mktemp("loud")
    file = tiny_llama(folder / "model", dtype=torch.float16) / "model.safetensors"
    tensors = load_file(file)
    for name, factor in (("gate_proj", 300.0), ("up_proj", 300.0), ("down_proj", 1 / 9e4)):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= factor
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    return folder / "model", folder / "notes.txt"


def test_logits_that_overflow_are_an_error_that_names_the_way_out(loud: tuple[Path, Path]) -> None:
    model, notes = map(str, loud)
    assert llmsparse.perplexity(model, notes, seq_len=32, windows=4, dtype="float32").perplexity < 1e4
    with pytest.raises(NumericalError, match=r"NaN or Inf when computed in float16.*try --dtype float32"):
        llmsparse.perplexity(model, notes, seq_len=32, windows=4, dtype="float16")


def test_the_command_fails_too(loud: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, notes = map(str, loud)
    assert main(["eval", model, "--text", notes, "--seq-len", "32", "--windows", "4", "--dtype", "float16"]) == 1
    out, err = capsys.readouterr()
    assert not out and "--dtype float32" in err
