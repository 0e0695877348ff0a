"""vLLM says after a packed folder what it says after the dense one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from continue_by_vllm import PROMPTS, TOKENS
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_process import needs_vllm, run_vllm, said_by_vllm

import llmsparse
from llmsparse.models.origin import BUILTIN_FOLDER
from llmsparse.sparsity.patterns import NofM

pytestmark = [pytest.mark.slow, needs_vllm]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, unstructured in its first half and 2:4 in the other, with a sparse head of its own; q and up of
    a block are left dense beside what they are merged with."""
    model: Any = AutoModelForCausalLM.from_pretrained(BUILTIN_FOLDER, dtype=torch.bfloat16)
    head = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.lm_head.weight = head
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2 or "embed" in name or "layers.1.self_attn.q" in name or "layers.1.mlp.up" in name:
                continue
            half = any(f"layers.{block}." in name for block in range(4, 8))
            score, rows = weight.abs().float(), len(weight)
            if half:
                keep = NofM(2, 4).keep(score, slice(0, score.shape[1]), score.shape[1]).view(rows, -1)
            else:
                keep = score > score.flatten().kthvalue(score.numel() // 2).values
            weight.masked_fill_(~keep, 0.0)
    folder = tmp_path_factory.mktemp("vllm") / "dense"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUILTIN_FOLDER).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    folder = dense.with_name("packed")
    llmsparse.pack(str(dense), folder)
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    assert "lm_head.weight" in layers and "model.layers.1.mlp.gate_proj.weight" in layers
    assert "model.layers.1.mlp.up_proj.weight" not in layers
    assert {described["pattern"] for described in layers.values()} == {"unstructured", "2:4"}
    return folder


@pytest.fixture(scope="module")
def said(dense: Path) -> list[list[int]]:
    """What vLLM says after the dense folder."""
    return said_by_vllm(dense)


def test_a_packed_folder_is_continued_as_the_dense_one(packed: Path, said: list[list[int]]) -> None:
    assert said_by_vllm(packed) == said


def test_transformers_says_the_same_of_the_dense_one(dense: Path, said: list[list[int]]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(dense)
    for prompt, continued in zip(PROMPTS, said, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        answer = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        assert answer[0, ids.shape[1] :].tolist() == continued


def test_it_is_by_our_kernels_too(packed: Path, said: list[list[int]]) -> None:
    assert said_by_vllm(packed, "cpu-bitmask") == said


def test_compiled_graphs_do_too(packed: Path, said: list[list[int]]) -> None:
    assert said_by_vllm(packed, "cpu-bitmask", enforce_eager=False) == said


def test_two_processes_share_the_rows_and_columns(packed: Path, said: list[list[int]]) -> None:
    assert said_by_vllm(packed, "cpu-bitmask", tensor_parallel_size=2) == said


@pytest.fixture(scope="module")
def few_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in 3 bits, steps of 128 columns."""
    folder = tmp_path_factory.mktemp("few") / "bits"
    some: dict[str, Any] = {"calibration": "builtin", "calibration_samples": 8, "seq_len": 128, "device": "cpu"}
    llmsparse.quantize("builtin", bits=3, group=128, output=str(folder), **some)
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_few_bits_are_continued_as_what_they_stand_for(few_bits: Path, processes: int, tmp_path: Path) -> None:
    llmsparse.unpack(str(few_bits), tmp_path / "dense")
    found = said_by_vllm(few_bits, "cpu-nested", tensor_parallel_size=processes)
    assert found == said_by_vllm(tmp_path / "dense")


def changed(packed: Path, folder: Path, **keys: Any) -> Path:
    """A copy of a packed folder that says something else of itself."""
    folder.mkdir()
    for file in packed.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= keys
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_of_a_later_version_is_refused_in_a_line(packed: Path, tmp_path: Path) -> None:
    done = run_vllm(changed(packed, tmp_path / "later", format_version=9))
    line = "packed in format version 9, this llmsparse reads up to 2; install a newer llmsparse"
    assert done.returncode and any(line in found for found in done.stderr.splitlines())


def test_packed_experts_are_refused_in_a_line(packed: Path, tmp_path: Path) -> None:
    described = {"shape": [2, 4, 8], "dtype": "bfloat16", "nnz": 3, "pattern": "unstructured"}
    done = run_vllm(changed(packed, tmp_path / "experts", layers={"model.layers.0.mlp.experts.down_proj": described}))
    line = "model.layers.0.mlp.experts.down_proj: packed weights of experts are not run in vLLM; run the folder by"
    assert done.returncode and any(line in found for found in done.stderr.splitlines())
