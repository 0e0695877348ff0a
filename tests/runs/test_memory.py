"""Peak memory: measured, and independent of a model's depth."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch

from llmsparse.runs.memory import PeakMemory, anonymous_bytes, available_bytes

MIB = 2**20


def test_the_peak_counts_what_was_allocated_and_freed_again() -> None:
    start = anonymous_bytes()
    with PeakMemory(torch.device("cpu"), interval_seconds=0.005) as memory:
        block = numpy.ones(128 * MIB, dtype=numpy.uint8)
        held = memory.read()
        del block
    assert held - start > 100 * MIB
    assert memory.bytes >= held


@pytest.mark.gpu
def test_what_torch_has_reserved_on_a_gpu_and_lies_idle_can_still_be_taken() -> None:
    device = torch.device("cuda:0")
    torch.cuda.empty_cache()
    before = available_bytes(device)
    block = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    assert before - available_bytes(device) >= 256 * MIB
    del block
    assert torch.cuda.memory_reserved(device) >= 256 * MIB
    assert before - available_bytes(device) < 64 * MIB


PRUNE = """
import json, sys, torch, llmsparse
torch.set_num_threads(1)
model, out, tokens, method = sys.argv[1:]
report = llmsparse.prune(model=model, output=out, method=method, sparsity=0.5, calibration=tokens,
                         calibration_samples=4, match_steps=0, device="cpu",
                         only=["*.down_proj", "*.q_proj"])
print(json.dumps(report.peak_memory_bytes))
"""


def peak_of(model: Path, folder: Path, method: str) -> int:
    from safetensors.torch import save_file

    tokens = folder / "tokens.safetensors"
    save_file({"input_ids": torch.randint(0, 384, (4, 128), generator=torch.Generator().manual_seed(0))}, tokens)
    run = subprocess.run(
        [sys.executable, "-c", PRUNE, str(model), str(folder / "out"), str(tokens), method],
        check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(run.stdout)


@pytest.mark.slow
def test_pruning_64_blocks_needs_the_memory_of_8(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    peaks = {}
    for layers in (8, 64):
        folder = tmp_path / str(layers)
        folder.mkdir()
        model = tiny_llama(folder / "model", layers=layers, hidden=256, ffn=1024)
        peaks[layers] = peak_of(model, folder, "sparsegpt")
    assert peaks[64] <= 1.1 * peaks[8], peaks


@pytest.mark.slow
def test_a_3_gb_checkpoint_in_one_shard_is_pruned_with_half_of_it(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Written block by block, so that the test needs no more memory than the run."""
    from transformers import AutoConfig

    from llmsparse.storage.checkpoint import CheckpointWriter

    model = tiny_llama(tmp_path / "model", hidden=2048, ffn=8192, layers=1, dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = 24
    config.save_pretrained(model)
    from safetensors.torch import load_file

    block = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    tensors = {key: tensor for key, tensor in block.items() if ".layers." not in key}
    for key, tensor in block.items():
        tensors |= {key.replace(".layers.0.", f".layers.{i}."): tensor for i in range(24) if ".layers." in key}
    writer = CheckpointWriter(model, {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}, 10**12)
    writer.write(tensors)
    writer.finish()
    assert (model / "model.safetensors").stat().st_size > 2.8e9
    assert peak_of(model, tmp_path, "wanda") <= 1.5e9


def test_a_system_without_proc_tells_its_free_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_proc(file: Any, *rest: Any, **options: Any) -> Any:
        if str(file).startswith(("/proc/meminfo", "/sys/fs")):
            raise FileNotFoundError(file)
        return io.open(file, *rest, **options)  # noqa: UP020

    monkeypatch.setattr("llmsparse.runs.memory.open", without_proc, raising=False)
    assert 0 < available_bytes(torch.device("cpu")) <= psutil.virtual_memory().total
