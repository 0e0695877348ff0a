"""Names and tensors pass between disk and module by transformers' rules, in whatever part and dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_random, stream, tiny_config, windows
from torch import Tensor
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming

from llmsparse.errors import CheckpointError
from llmsparse.models.naming import Group
from llmsparse.models.streamed import Activations, Block
from llmsparse.models.tap import Tap
from llmsparse.storage.checkpoint import CheckpointReader


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`rules([...])`: how a Llama's checkpoint differs from its module."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # builds the table

    def use(mapping: list[WeightConverter | WeightRenaming]) -> None:
        monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", mapping)

    return use


def inputs_of(block: Block, acts: Activations) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    block.run(acts, Tap(block, lambda slot, x: seen.setdefault(slot[0], x.clone())))
    return seen


def test_one_tensor_on_disk_may_be_three_in_the_module(rules: Any, tmp_path: Path) -> None:
    parts = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]
    rules([WeightConverter("self_attn.qkv.weight", parts, [Chunk(dim=0)])])
    model = stream(save_random(tiny_config("llama", num_key_value_heads=4), tmp_path))
    weight = model.weights(0)[0]
    assert (weight.name, weight.shape) == ("model.layers.0.self_attn.qkv", (96, 32))
    assert weight.slot == (parts[0], None)
    acts, block = model.embed(windows((2, 24))), model.block(0)
    x = inputs_of(block, acts)[parts[0]]
    wanted = [torch.nn.functional.linear(x, block.module.get_parameter(part)) for part in parts]
    torch.testing.assert_close(x @ block.view(weight).T, torch.cat(wanted, 1))
    back = block.on_disk({part: block.module.get_parameter(part) for part in parts})
    assert back.keys() == {weight.key} and torch.equal(back[weight.key], block.stored[weight.key])
    assert block.in_module({weight.key: block.stored[weight.key]}).keys() == set(parts)


@pytest.mark.parametrize("inner", [32, 48])
def test_a_matrix_that_conversion_transposes_is_viewed_the_right_way_round(
    inner: int, rules: Any, tmp_path: Path
) -> None:
    rules([WeightConverter("mlp.w_down", "mlp.down_proj.weight", [Transpose(0, 1)])])
    model = stream(save_random(tiny_config("llama", intermediate_size=inner), tmp_path))
    weight = model.weights(1)[-1]
    assert (weight.name, weight.shape, weight.transposed) == ("model.layers.1.mlp.w_down", (32, inner), True)
    block = model.block(1)
    assert torch.equal(block.view(weight), block.module.get_parameter("mlp.down_proj.weight"))
    assert CheckpointReader(tmp_path).spec(weight.key).shape == (inner, 32)


def test_a_name_that_is_the_modules_own_is_left_alone_by_rules_for_older_ones(rules: Any, tmp_path: Path) -> None:
    rules([WeightRenaming("mlp.up_proj", "mlp.fc1")])
    model = stream(save_random(tiny_config("llama"), tmp_path))
    assert "model.layers.0.mlp.up_proj" in [weight.name for weight in model.weights(0)]
    block = model.block(0)
    assert block.on_disk(dict(block.module.state_dict())).keys() == block.stored.keys()


def test_experts_are_numbered_as_numbers_are() -> None:
    group = Group("experts.up", None)
    group.sources = [(f"experts.{e}.w{kind}", f"w{kind}") for kind in (1, 3) for e in (0, 1, 2, 10)]
    assert group.position("experts.10.w1") == group.position("experts.10.w3") == 3


def test_eleven_experts_keep_their_order(tmp_path: Path) -> None:
    model = stream(save_random(tiny_config("qwen3_moe", num_experts=11), tmp_path))
    block = model.block(0)
    for weight in block.weights:
        if weight.name.endswith("down_proj"):
            expert = int(weight.name.split(".")[-2])
            assert weight.slot == ("mlp.experts.down_proj", expert)
            assert torch.equal(block.view(weight), block.module.get_parameter("mlp.experts.down_proj")[expert])


def test_part_of_a_group_is_an_error_that_names_what_is_missing(tmp_path: Path) -> None:
    block = stream(save_random(tiny_config("mixtral"), tmp_path)).block(0)
    key = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    some = {name: tensor for name, tensor in block.stored.items() if name != key}
    with pytest.raises(CheckpointError, match=r"gate_up_proj is made of .* and of .*experts\.2\.w3\.weight"):
        block.in_module(some)
