"""Fewer blocks: which ones go, and that the result is the model with these blocks taken out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmsparse.errors import CheckpointError, LlmsparseError, RecipeError
from llmsparse.shrinking.block_scores import by_influence, by_suffix
from tests.architectures import random_model, stream, tiny_config
from tests.shrinking.small_models import load, logits, random_folder, saved, shrink

LAYERS = {"num_hidden_layers": 5}


def removed(report: Any) -> list[int]:
    return [one.index for one in report.reductions[0].removed]


def by_hand(folder: Path, gone: list[int]) -> Any:
    """The model in `folder/model` without these blocks, taken out of transformers' own list of blocks."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in gone]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    types = getattr(model.config, "layer_types", None)
    model.config.num_hidden_layers = len(kept)
    if types:
        model.config.layer_types = [kind for index, kind in enumerate(types) if index not in gone]
    model.model.layers = torch.nn.ModuleList(kept)
    return model


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("llama", "suffix"),
        ("qwen3", "influence"),
        ("gemma2", "suffix"),
        ("phi3", "influence"),
        ("qwen3_moe", "influence"),
    ],
)
def test_the_result_is_the_model_without_these_blocks_bit_for_bit(name: str, score: str, tmp_path: Path) -> None:
    folder = random_folder(tiny_config(name, **{} if name == "gemma2" else LAYERS), tmp_path)
    report = shrink(folder, blocks="60%", score=score, refit=False)
    made = load(folder / "out")
    assert len(removed(report)) == 2
    assert torch.equal(logits(made), logits(by_hand(folder, removed(report))))
    source, out = load_file_all(folder / "model"), load_file_all(folder / "out")
    assert sum(map(torch.numel, out.values())) < sum(map(torch.numel, source.values()))


def load_file_all(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@torch.no_grad()
def test_suffix_is_the_divergence_of_the_output_without_a_block(tmp_path: Path) -> None:
    folder = random_folder(tiny_config("gemma2"), tmp_path)
    batches = list(load_file(folder / "windows.safetensors")["input_ids"].split(3))
    found = by_suffix(stream(folder / "model"), batches, 2, lambda: None)

    def divergence(gone: list[int]) -> float:
        p, q = (by_hand(folder, some)(torch.cat(batches)).logits.double().log_softmax(-1) for some in ([], gone))
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean().item()

    gone: list[int] = []
    for one in found:
        scores = {index: divergence([*gone, index]) for index in range(4) if index not in gone}
        assert one.index == min(scores, key=lambda index: scores[index])
        assert one.score == pytest.approx(scores[one.index], rel=1e-4)
        gone.append(one.index)


@torch.no_grad()
def test_influence_is_one_minus_the_cosine_of_what_enters_and_what_leaves(tmp_path: Path) -> None:
    model: Any = random_model(tiny_config("llama", **LAYERS))
    folder = saved(model, tmp_path)
    batches = list(load_file(folder / "windows.safetensors")["input_ids"].split(3))
    found = by_influence(stream(folder / "model"), batches, 5, lambda: None)
    states = [*model.model(torch.cat(batches), output_hidden_states=True).hidden_states[:-1]]
    last: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    model(torch.cat(batches))
    states.append(last[0])
    for one in found:
        cosine = F.cosine_similarity(states[one.index], states[one.index + 1], dim=-1).mean().item()
        assert one.score == pytest.approx(1 - cosine, abs=1e-5)
    assert [one.score for one in found] == sorted(one.score for one in found)


def test_a_block_that_does_nothing_is_the_first_to_go(tmp_path: Path) -> None:
    model: Any = random_model(tiny_config("llama", **LAYERS))
    with torch.no_grad():
        for projection in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            projection.weight.zero_()
    folder = saved(model, tmp_path)
    for score in ("suffix", "influence"):
        assert removed(shrink(folder, blocks="4", score=score, overwrite=True)) == [1]
        assert torch.equal(logits(load(folder / "out")), logits(model))


@pytest.mark.parametrize(
    ("name", "changes", "fields"),
    [
        ("gemma2", {}, {"num_hidden_layers", "layer_types"}),
        ("smollm3", {}, {"num_hidden_layers", "layer_types", "no_rope_layers"}),
        ("gpt_oss", {}, {"num_hidden_layers", "layer_types"}),
        ("glm4_moe", {"num_hidden_layers": 4, "first_k_dense_replace": 2}, {"num_hidden_layers"}),
        ("llama", {"num_hidden_layers": 3, "eos_token_id": [2, 3, 4]}, {"num_hidden_layers"}),
    ],
)
def test_what_the_config_says_layer_by_layer_follows(
    name: str, changes: dict[str, Any], fields: set[str], tmp_path: Path
) -> None:
    folder = random_folder(tiny_config(name, **changes), tmp_path)
    report = shrink(folder, blocks="2", score="influence", refit=False)
    before, after = (json.loads((folder / part / "config.json").read_text()) for part in ("model", "out"))
    differing = {key for key in before | after if before.get(key) != after.get(key)}
    assert fields <= differing <= fields | {"first_k_dense_replace"}
    kept = [index for index in range(before["num_hidden_layers"]) if index not in removed(report)]
    for key in fields - {"num_hidden_layers"}:
        assert after[key] == [before[key][index] for index in kept]
    if "first_k_dense_replace" in before:
        assert after["first_k_dense_replace"] == sum(index < before["first_k_dense_replace"] for index in kept)
    load(folder / "out")


@pytest.mark.parametrize(
    ("name", "blocks", "error", "why"),
    [
        ("llama", "3", RecipeError, "there are 2; ask for fewer"),
        ("llama", "2", RecipeError, "nothing would go"),
        ("llama", "0", RecipeError, "something has to stay"),
        ("jamba", "75%", CheckpointError, "jamba cannot be made of 3 of its 4 blocks"),
    ],
)
def test_what_cannot_be_is_refused(
    name: str, blocks: str, error: type[LlmsparseError], why: str, tmp_path: Path
) -> None:
    folder = random_folder(tiny_config(name), tmp_path)
    with pytest.raises(error) as raised:
        shrink(folder, blocks=blocks)
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (folder / "out").exists() and not (folder / "out.partial").exists()
