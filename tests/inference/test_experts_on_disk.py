"""A packed mixture whose experts stay on disk computes what it computes from memory, and is what it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import MIXTURE, windows
from sparse import assert_same_tensors
from stored_mixtures import FEW, few_bits_of, least, logits, model_of
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.backends.cpu import nested, why_not
from llmsparse.errors import RecipeError
from llmsparse.inference.leaving import on_disk_of

Folders = Callable[..., tuple[Path, Path]]

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason="the kernels cannot be built here"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]


@pytest.mark.parametrize("family", [name for name in MIXTURE if name != "llama4_text"])
def test_it_computes_the_bits_that_it_computes_from_memory(family: str, folders: Folders) -> None:
    packed = folders(family)[1]
    whole, ours = model_of(packed, None), model_of(packed, least(packed))
    on_disk = on_disk_of(ours)
    assert on_disk is not None and on_disk.memory.room == 4 and on_disk_of(whole) is None
    assert sum(one.count for one in on_disk.layers) >= 4
    for shape in ((1, 1), (1, 5), (2, 9), (3, 40), (1, 1)):
        assert torch.equal(logits(ours, *shape), logits(whole, *shape))
    tally = on_disk.memory.tally
    assert tally.asked >= tally.found and tally.read >= 4 and tally.read_bytes > 0 and tally.repeated == 0


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_experts_of_a_pattern_need_no_index(pattern: str, folders: Folders) -> None:
    packed = folders("mixtral", pattern)[1]
    ours = model_of(packed)
    assert torch.equal(logits(ours), logits(model_of(packed, None)))
    on_disk = on_disk_of(ours)
    assert on_disk is not None and sum(one.index_bytes() for one in on_disk.layers) == 0
    assert on_disk.memory.tally.repeated == 0 and all(one.by_number for one in on_disk.layers)


def test_in_another_dtype_it_computes_the_same(folders: Folders) -> None:
    packed = folders("mixtral")[1]
    ours, whole = model_of(packed, "150KB", dtype="float32"), model_of(packed, None, dtype="float32")
    assert logits(ours).dtype == torch.float32 and torch.equal(logits(ours), logits(whole))


@pytest.mark.parametrize("backend", ["cpu-nested", "cpu-nested-int8", "auto"])
@pytest.mark.skipif(nested.why_not() is not None, reason="the kernels cannot be built here")
def test_experts_in_few_bits_stay_on_disk_too(backend: str, few_bits: Path) -> None:
    ours, whole = (model_of(few_bits, memory, backend=backend) for memory in ("200KB", None))
    if backend == "auto":  # from memory such small ones run dense
        assert llmsparse.explain(ours).backends["cpu-nested"] >= 4
    else:
        assert torch.equal(logits(ours), logits(whole)) and torch.equal(logits(ours, 1, 30), logits(whole, 1, 30))


@pytest.mark.skipif(nested.why_not() is not None, reason="the kernels cannot be built here")
def test_numbers_of_experts_in_few_bits_are_in_the_memory_that_is_allowed(tmp_path: Path) -> None:
    """Each reader unpacks a matrix into whole bytes, and looks through them, before it repacks it."""
    few = few_bits_of(tmp_path, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    with pytest.raises(RecipeError) as refused:
        model_of(few, 1, backend="cpu-nested")
    found = re.search(r"beside ([\d.]+) MB to read with", str(refused.value))
    assert found is not None and 1e6 * float(found[1]) > 3 * 2 * 512 * 256  # gate and up are the larger


def unpacks_one_by_one(folder: Path) -> None:
    on_disk = on_disk_of(model_of(folder, "200KB", backend="auto"))
    assert on_disk is not None
    for stack in (stack for layer in on_disk.layers for stack in layer.stacks.values()):
        assert torch.equal(torch.stack(list(stack.unpacked())), stack.packed().unpack())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_are_unpacked_one_by_one_are_those_of_the_whole(family: str, folders: Folders) -> None:
    unpacks_one_by_one(folders(family)[1])


@pytest.mark.skipif(nested.why_not() is not None, reason="the kernels cannot be built here")
def test_so_are_experts_in_few_bits(few_bits: Path) -> None:
    unpacks_one_by_one(few_bits)


def test_saved_it_is_the_folder_that_it_came_from(folders: Folders, tmp_path: Path) -> None:
    packed = folders("qwen3_moe")[1]
    model_of(packed).save_pretrained(tmp_path / "again")
    assert_same_tensors(packed, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["quantization_config"] == json.loads((packed / "config.json").read_text())["quantization_config"]


def test_dequantized_it_is_the_dense_model(folders: Folders) -> None:
    pruned, packed = folders("gpt_oss")
    ours = model_of(packed).dequantize()
    assert torch.equal(logits(ours), logits(AutoModelForCausalLM.from_pretrained(pruned)))


def test_what_routers_say_ahead_is_not_in_what_the_model_gives(folders: Folders) -> None:
    packed, (ids,) = folders("mixtral")[1], windows((2, 9))
    with torch.no_grad():
        one, two = (
            model_of(packed, memory)(ids, labels=ids, output_router_logits=True, use_cache=False)
            for memory in (FEW, None)
        )
    assert len(one.router_logits) == len(two.router_logits) == 2 and torch.equal(one.aux_loss, two.aux_loss)


def test_it_is_loaded_by_transformers_too(folders: Folders) -> None:
    packed = folders("mixtral")[1]
    config = llmsparse.SparseConfig("cpu-bitmask", expert_memory=FEW)
    ours = AutoModelForCausalLM.from_pretrained(packed, quantization_config=config)
    assert torch.equal(logits(ours), logits(model_of(packed, None)))
    assert ours.num_parameters() == model_of(packed, None).num_parameters()
