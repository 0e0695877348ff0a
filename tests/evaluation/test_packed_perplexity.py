"""A packed folder is measured as what it unpacks to, to the last digit, without being unpacked first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sparse import save_sparse

import llmsparse
from llmsparse.cli.app import main

HOW: dict[str, Any] = {"seq_len": 16, "device": "cpu"}


def token_file(folder: Path) -> Path:
    ids = torch.randint(0, 60, (6, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    return folder / "ids.safetensors"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_what_pack_wrote(family: str, tmp_path: Path) -> None:
    text, dense = token_file(tmp_path), save_sparse(family, tmp_path / "dense")
    llmsparse.pack(str(dense), tmp_path / "packed")
    packed, before = (llmsparse.perplexity(folder, text, **HOW) for folder in (tmp_path / "packed", dense))
    assert packed.perplexity == before.perplexity and packed.protocol == before.protocol


def test_what_quantize_wrote_with_a_head_of_its_own_beside_the_source(
    tiny_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_llama(tmp_path / "tiny", hidden=64, ffn=96, dtype=torch.bfloat16))
    text = token_file(tmp_path)
    small: dict[str, Any] = {"calibration": str(text), "calibration_samples": 4, "device": "cpu"}
    llmsparse.quantize(model, bits=3, head_bits=6, output=str(tmp_path / "packed"), **small)
    llmsparse.unpack(str(tmp_path / "packed"), tmp_path / "dense")
    packed, unpacked = (llmsparse.perplexity(tmp_path / name, text, **HOW) for name in ("packed", "dense"))
    assert packed.perplexity == unpacked.perplexity != llmsparse.perplexity(model, text, **HOW).perplexity
    arguments = ["eval", model, "--text", str(text), "--seq-len", "16", "--device", "cpu"]
    assert main([*arguments, "--baseline", str(tmp_path / "packed"), "--json"]) == 0, capsys.readouterr().err
