"""Peak memory of a smaller model does not grow with depth, is about what the plan says, and a third of the model it comes of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmsparse.models.new_config import empty_model
from llmsparse.storage.checkpoint import CheckpointWriter

RUN = """
import json, sys, torch, llmsparse
torch.set_num_threads(1)
verb, keys = sys.argv[1], json.loads(sys.argv[2])
kind = {"shrink": llmsparse.ShrinkRecipe, "scores": llmsparse.ScoresRecipe}[verb]
estimate = llmsparse.plan(kind(**keys)).memory_bytes()
print(json.dumps([estimate, getattr(llmsparse, verb)(**keys).peak_memory_bytes]))
"""


def write_mixture(folder: Path, blocks: int, inner: int) -> Path:
    """A mixture of 64 experts in bfloat16, 100 kB a block for each of `inner` hidden units, written block by block."""
    sizes: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    sizes |= {"num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": inner, "intermediate_size": 512}
    sizes |= {"num_hidden_layers": blocks, "vocab_size": 384, "max_position_embeddings": 512, "dtype": "bfloat16"}
    config = CONFIG_MAPPING["qwen3_moe"](**sizes, architectures=["Qwen3MoeForCausalLM"])
    folder.mkdir()
    config.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(config, config.to_dict()).state_dict().items()}
    writer = CheckpointWriter(folder, {name: (shape, torch.bfloat16) for name, shape in shapes.items()}, 2**40)
    for number, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(number)
        writer.write({name: (0.02 * torch.randn(shape, generator=generator)).bfloat16()})
    writer.finish()
    return folder


def measured(verb: str, model: Path, folder: Path, **environment: str) -> tuple[int, int]:
    """What the plan says that `verb` needs on a mixture, and what it needed."""
    keys: dict[str, Any] = {"experts": "50%"} if verb == "shrink" else {}
    return measured_on(
        torch.randint(0, 384, (8, 64), generator=torch.Generator().manual_seed(0)),
        verb,
        model,
        folder,
        keys,
        environment,
    )


def measured_on(
    ids: torch.Tensor, verb: str, model: Path, folder: Path, keys: dict[str, Any], environment: dict[str, str]
) -> tuple[int, int]:
    """The same with these windows and keys of the recipe."""
    tokens = folder / "tokens.safetensors"
    save_file({"input_ids": ids}, tokens)
    keys = {"calibration": str(tokens), "calibration_samples": len(ids), "device": "cpu"} | keys
    asked = json.dumps(keys | {"model": str(model), "output": str(folder / f"out-{model.name}")})
    run = subprocess.run(
        [sys.executable, "-c", RUN, verb, asked], check=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    estimate, peak = json.loads(run.stdout)
    assert 0.8 <= estimate / peak <= 1.5
    return estimate, peak


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["scores", "shrink"])
def test_64_blocks_need_the_memory_of_8(verb: str, tmp_path: Path) -> None:
    """Of 6 MB each, since threads decide how many are read, made and written at once; and what is freed is gone at once,
    since glibc would keep more or less of it."""
    peaks: dict[int, int] = {}
    for blocks in (8, 64):
        model = write_mixture(tmp_path / f"model-{blocks}", blocks, inner=64)
        peaks[blocks] = measured(verb, model, tmp_path, MALLOC_MMAP_THRESHOLD_="65536")[1]
    assert peaks[64] <= 1.1 * peaks[8], peaks


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["scores", "shrink"])
def test_a_mixture_is_shrunk_in_a_third_of_its_own_size(verb: str, tmp_path: Path) -> None:
    model = write_mixture(tmp_path / "model", 64, inner=224)
    estimate, peak = measured(verb, model, tmp_path)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert 3 * peak <= size, (estimate, peak, size)


@pytest.mark.slow
def test_a_fit_to_logits_needs_what_the_plan_says(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 8192}
    sizes |= {"intermediate_size": 1024, "num_hidden_layers": 2, "max_position_embeddings": 256}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**sizes))
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 8192, (32, 256), generator=torch.Generator().manual_seed(0))
    measured_on(ids, "shrink", tmp_path / "model", tmp_path, {"ffn": "75%"}, {})
