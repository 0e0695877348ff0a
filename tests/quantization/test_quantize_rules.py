"""Rules of `quantize`: bits, a group or a method of their own for the weights that a glob matches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import random_model, tiny_config
from safetensors.torch import save_file

import llmsparse
from llmsparse.errors import RecipeError
from llmsparse.quantization.plan import make_plan
from llmsparse.quantization.recipe import QuantizeRecipe
from tests.quantization.quantized import SMALL, weights_of


def test_bits_that_a_rule_cannot_take_are_told_and_no_others(model: str) -> None:
    rules = [{"match": "*.k_proj", "bits": 8}]
    report = llmsparse.quantize(model, bits=2.5, output="out", rules=rules, **SMALL)
    by_name = {True: list[Any](), False: list[Any]()}
    for row in report.rows:
        by_name[row.name.endswith("k_proj")].append(row)
    mean = {
        of: sum(row.bits * row.numel for row in rows) / sum(row.numel for row in rows) for of, rows in by_name.items()
    }
    assert mean[True] < 7.5 and mean[False] == pytest.approx(2.5, abs=0.01)
    [warning] = [text for text in report.warnings if "were asked for" in text]
    assert warning.startswith(
        f"{mean[True]:.3f} bits a weight, 8 were asked for of model.layers.0.self_attn.k_proj and 1 more"
    )


def test_rules_give_weights_bits_a_group_and_a_method_of_their_own(model: str) -> None:
    rules = [
        {"match": "*.mlp.*", "bits": 4},
        {"match": "*.down_proj", "bits": 3, "group": 24, "method": "nearest"},
        {"match": "*.k_proj", "group": 16},
    ]
    recipe = QuantizeRecipe(model=model, bits=2.5, output="out", rules=rules, **SMALL)
    report = llmsparse.quantize(recipe)
    found: dict[str, list[float]] = {}
    for row in report.rows:
        found.setdefault(row.name.rpartition(".")[2], []).append(row.bits)
        assert row.group == {"down_proj": 24, "k_proj": 16}.get(row.name.rpartition(".")[2], row.shape[1])
    means = {name: sum(bits) / len(bits) for name, bits in found.items()}
    wanted = {"q_proj": 2.5, "k_proj": 2.5, "up_proj": 4, "gate_proj": 4, "down_proj": 3}
    assert {name: means[name] for name in wanted} == pytest.approx(wanted, abs=0.06)
    assert any("8 weights 2.5, 2 weights 3, 4 weights 4" in text for _, text in report.findings())
    plan = make_plan(recipe.replace(output="new"))
    assert plan.bits == pytest.approx(report.bits, abs=0.01) and not report.warnings
    nearest = llmsparse.quantize(recipe.replace(method="nearest", rules=rules[1:2], output="nearest"))
    alike = [weights_of(out)["model.layers.0.mlp.down_proj.weight"].numbers() for out in ("out", "nearest")]
    assert (alike[0] == alike[1]).float().mean() > 0.9, "the first block's is rounded by itself in both"
    assert nearest.recipe["rules"] == [{"match": "*.down_proj", "bits": 3.0, "group": 24, "method": "nearest"}]
    again = QuantizeRecipe.load("out/llmsparse_recipe.yaml", {"output": "again"})
    llmsparse.quantize(again)
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing said": ({"match": "*"}, "rules[0]: says nothing but match"),
    "no weight": ({"match": "*.mlpp", "bits": 3}, "rules[0]: match '*.mlpp' matches none of 14 weights"),
    "too few": (
        {"match": "*.q_proj", "bits": 0.5},
        "rules[0], bits 0.5: model.layers.0.self_attn.q_proj takes at least",
    ),
    "no bits": ({"match": "*", "bits": 0}, "rules[0].bits: got 0, wanted a number of bits"),
    "a group that does not divide": (
        {"match": "*.q_proj", "group": 48},
        "rules[0], group 48: model.layers.0.self_attn.q_proj has 64 inputs",
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_rules_that_cannot_be(case: str, model: str) -> None:
    rule, wanted = RULES[case]
    with pytest.raises(RecipeError) as error:
        llmsparse.quantize(model, bits=2.5, output="out", rules=[rule], **SMALL)
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_experts_that_are_one_tensor_share_a_group_and_values_leave_no_room_for_bits(model: str) -> None:
    random_model(tiny_config("mixtral")).to(torch.bfloat16).save_pretrained("source")
    torch_ids = torch.randint(0, 60, (6, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": torch_ids}, "ids.safetensors")
    keys: dict[str, Any] = {"calibration": "ids.safetensors", "calibration_samples": 4}
    with pytest.raises(RecipeError, match=r"are one tensor in the model .*give both the same"):
        llmsparse.quantize("source", bits=3.5, rules=[{"match": "*.w1", "group": 8}], output="out", **keys)
    with pytest.raises(RecipeError, match=r"are one tensor in the model .* them 3 and 3.5 bits; give both the same"):
        llmsparse.quantize("source", bits=3.5, rules=[{"match": "*.w1", "bits": 3}], output="out", **keys)
    llmsparse.quantize("source", bits=4.5, rules=[{"match": "*.w[13]", "group": 8}], output="out", **keys)
    random_model(tiny_config("gpt_oss")).to(torch.bfloat16).save_pretrained("stacked")
    one = [{"match": "*.experts.down_proj.1", "group": 8}]
    with pytest.raises(RecipeError, match=r"down_proj\.0 and .*down_proj\.1 are one tensor .* give both the same"):
        llmsparse.quantize("stacked", bits=3.5, rules=one, output="more", **keys)
    with pytest.raises(RecipeError, match="beside values int8, which says how many bits"):
        llmsparse.quantize("source", values="int8", rules=[{"match": "*", "bits": 3}], output="more", **keys)
