"""A streamed model is the whole model: same logits to the bit, same tensors under the same names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, random_model, save_random, stream, tiny_config, windows
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmsparse.checkpoint import CheckpointReader
from llmsparse.errors import CheckpointError
from llmsparse.model import Block, StreamedModel
from llmsparse.tap import Tap

CPU = torch.device("cpu")


def whole(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers loads it. It maps the files, where tensors lie at odd addresses, and wants gradients:
    both choose other kernels, which differ in the last bit."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval().requires_grad_(False)


def streamed_logits(model: StreamedModel, batches: list[Tensor]) -> list[Tensor]:
    acts = model.embed(batches)
    for index in range(len(model.block_names)):
        block = model.block(index)
        acts = block.run(acts)
        block.evict()
    return [model.logits(hidden) for hidden in acts.hidden]


@dataclass
class Family:
    name: str
    folder: Path
    model: StreamedModel


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    folder = save_random(tiny_config(request.param), tmp_path_factory.mktemp(request.param))
    assert len(list(folder.glob("*.safetensors"))) > 1
    yield Family(request.param, folder, stream(folder))


def test_logits_are_those_of_the_whole_model_to_the_bit(family: Family) -> None:
    batches = windows((2, 24), (2, 24), (1, 11))
    reference = whole(family.folder)
    with torch.no_grad():
        wanted = [reference(ids, use_cache=False).logits for ids in batches]
    for got, want in zip(streamed_logits(family.model, batches), wanted, strict=True):
        assert torch.equal(got, want)


def test_module_tensors_go_back_to_disk_under_their_own_names(family: Family) -> None:
    for index in range(len(family.model.block_names)):
        block = family.model.block(index)
        back = block.on_disk(dict(block.module.state_dict()))
        assert set(back) == set(block.stored) == set(family.model.block_keys(index))
        for key, tensor in block.stored.items():
            assert torch.equal(back[key], tensor), key
        block.evict()
    keys = [key for index in range(len(family.model.block_names)) for key in family.model.block_keys(index)]
    assert sorted(keys + family.model.outside_keys) == sorted(CheckpointReader(family.folder).keys())


NOT_PRUNED = r"norm|ln_|conv1d|router|\.gate\.weight|shared_expert_gate|x_proj|dt_proj|A_log|sinks|bias"


def test_every_matrix_of_a_block_is_prunable_but_routers_and_coefficients(family: Family) -> None:
    reader = CheckpointReader(family.folder)
    for index in range(len(family.model.block_names)):
        matrices = {key for key in family.model.block_keys(index) if len(reader.spec(key).shape) > 1}
        weights = family.model.weights(index)
        assert {w.key for w in weights if w.prunable} == {key for key in matrices if not re.search(NOT_PRUNED, key)}
        for key in {weight.key for weight in weights}:
            of_key = [weight for weight in weights if weight.key == key]
            assert sum(w.shape[0] * w.shape[1] for w in of_key) == torch.Size(reader.spec(key).shape).numel()
        assert len({weight.name for weight in weights}) == len(weights)
