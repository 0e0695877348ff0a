"""A dense model that `factorize` made a mixture of says in vLLM what it says in transformers, whatever it is written as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from continue_by_vllm import PROMPTS, TOKENS
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_process import needs_vllm, said_by_vllm

import llmsparse

pytestmark = [pytest.mark.slow, needs_vllm]


@pytest.mark.parametrize("container", ["glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_container_is_continued_as_in_transformers(container: str, tmp_path: Path) -> None:
    shared = 0 if container in ("mixtral", "qwen3_moe") else 1
    keys: dict[str, Any] = {"experts": 4, "shared": shared, "active": 2, "router_steps": 2}
    keys |= {"calibration": "builtin", "calibration_samples": 4, "seq_len": 64, "device": "cpu"}
    folder = tmp_path / container
    llmsparse.factorize(model="builtin", output=str(folder), container=container, **keys)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said: list[list[int]] = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(ids, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS, pad_token_id=0)
        said.append(new[0, ids.shape[1] :].tolist())
    assert said_by_vllm(folder) == said
