"""Experts taken out of every architecture: what is left loads in plain transformers, and computes what it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.storage.checkpoint import CheckpointReader
from tests.architectures import MIXTURE, VOCABULARY, random_model, save_random, tiny_config
from tests.wrapped import load, save_wrapped

FAMILIES = [*MIXTURE, "jamba", "qwen3_next"]
PER_EXPERT = ("mixtral", "qwen3_moe", "deepseek_v3")  # on disk
IDS = torch.tensor([[1, 5, 7, 11, 13, 17, 19, 23]])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(3, VOCABULARY, (24, 16), generator=generator)}, file)
    return file


@pytest.fixture
def shrink(tokens: Path, tmp_path: Path) -> Callable[..., Any]:
    """Shrink a folder into tmp_path/out; returns the report."""

    def run(model: Path, **keys: Any) -> Any:
        small = {"calibration": str(tokens), "calibration_samples": 16, "batch_size": 2, "device": "cpu"}
        return llmsparse.shrink(model, output=tmp_path / "out", **small | keys)

    return run


def tensors(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return reader.read(reader.keys())


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_is_an_ordinary_checkpoint_of_fewer_experts(
    name: str, shrink: Callable[..., Any], tmp_path: Path
) -> None:
    source = save_random(tiny_config(name), tmp_path / "model")
    report = shrink(source, experts="75%")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    before, after = config(source), config(tmp_path / "out")
    changed = {key for key in before if before[key] != after[key]}
    assert before.keys() == after.keys()
    assert len(changed) == 1 and {after[key] for key in changed} == {3}
    shapes = [tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() == 3]
    assert {shape[0] for shape in shapes if shape[0] in (3, 4)} == {3}
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (1, 12)
    kept = [block.rows["experts"]["kept"] for block in report.blocks if block.rows]
    assert kept and all(len(experts) == 3 for experts in kept)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3", "llama4_text"])
def test_kept_tensors_are_the_sources_bytes_where_nothing_is_fitted(
    name: str, shrink: Callable[..., Any], tmp_path: Path
) -> None:
    source = save_random(tiny_config(name), tmp_path / "model")
    report = shrink(source, experts=2, score="frequency", refit=False)
    before, after = tensors(source), tensors(tmp_path / "out")
    kept = {block.name.rpartition(".")[2]: block.rows["experts"]["kept"] for block in report.blocks if block.rows}
    for key, tensor in after.items():
        parts = key.split(".")
        block = next((part for part in parts if part.isdecimal()), "")
        experts = kept.get(block)
        if experts is None:
            assert torch.equal(tensor, before[key]), key
        elif "experts" in parts and parts[parts.index("experts") + 1].isdecimal():  # one tensor an expert
            place = parts.index("experts") + 1
            parts[place] = str(experts[int(parts[place])])
            assert torch.equal(tensor, before[".".join(parts)]), key
        elif tensor.shape != before[key].shape:
            axis = next(axis for axis, size in enumerate(before[key].shape) if size != tensor.shape[axis])
            assert torch.equal(tensor, before[key].index_select(axis, torch.tensor(experts))), key
        else:
            assert torch.equal(tensor, before[key]), key
    assert len(after) < len(before) if name in PER_EXPERT else len(after) == len(before)


def silenced(name: str, folder: Path, experts: list[int]) -> Path:
    """A model of 32 experts whose routers never choose some. (32 and 16 columns of a product are rounded alike, others not.)"""
    count = "num_local_experts" if name == "gpt_oss" else "n_routed_experts"
    active = 4 if name == "gpt_oss" else 2  # the gates of more than two are added up in no order
    model = random_model(tiny_config(name, **{count: 32, "num_experts_per_tok": active}))
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if key.endswith(("e_score_correction_bias", "router.bias")):
            with torch.no_grad():
                value.view(-1)[experts] = -1e4
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "score"), [("gpt_oss", "hope"), ("deepseek_v3", "reap"), ("glm4_moe", "frequency")])
def test_taking_out_experts_that_never_run_changes_no_bit_of_the_logits(
    name: str, score: str, shrink: Callable[..., Any], tmp_path: Path
) -> None:
    silent = list(range(1, 32, 2))
    source = silenced(name, tmp_path / "model", silent)
    report = shrink(source, experts="50%", score=score)
    rows = [block.rows["experts"] for block in report.blocks if block.rows]
    assert all(row["kept"] == list(range(0, 32, 2)) and row["unreached"] == silent for row in rows)
    whole, less = (
        AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
        for folder in (source, tmp_path / "out")
    )
    with torch.no_grad():
        assert torch.equal(whole(IDS).logits, less(IDS).logits)
    assert report.perplexity["before"] == report.perplexity["after"]
    assert "experts were reached by no token, expert 1 of model.layers." in " ".join(report.warnings)


def test_groups_lose_equally_many_and_the_router_still_chooses_among_them(
    shrink: Callable[..., Any], tmp_path: Path
) -> None:
    grouped = {"n_routed_experts": 12, "n_group": 3, "topk_group": 2}
    source = save_random(tiny_config("deepseek_v3", **grouped), tmp_path / "model")
    report = shrink(source, experts="55%")  # to the nearest multiple of the number of groups
    kept = report.blocks[1].rows["experts"]["kept"]
    assert [sum(expert // 4 == group for expert in kept) for group in range(3)] == [2, 2, 2]
    assert config(tmp_path / "out")["n_routed_experts"] == 6
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(IDS, max_new_tokens=2)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next"])
def test_a_block_for_multi_token_prediction_keeps_as_many_by_the_norm_of_their_weights(
    name: str, shrink: Callable[..., Any], tmp_path: Path
) -> None:
    source = save_random(tiny_config(name), tmp_path / "model", shard="5GB")
    own = load_file(source / "model.safetensors")
    at = {"deepseek_v3": ("model.layers.1.", "model.layers.2."), "qwen3_next": ("model.layers.1.", "mtp.layers.0.")}[
        name
    ]
    more = {key.replace(*at): value.clone() for key, value in own.items() if key.startswith(at[0])}
    more |= {f"{at[1]}enorm.weight": torch.randn(32)}
    for key, value in more.items():
        if ".experts.2." in key or ".experts.1." in key:
            value *= 5  # the largest
    save_file(own | more, source / "model.safetensors", {"format": "pt"})
    shrink(source, experts=2, refit=False)
    after = load_file(tmp_path / "out" / "model.safetensors")
    left = {key for key in after if key.startswith(at[1])}
    assert len(left) == len({key for key in after if key.startswith(at[0])}) + 1
    for key in left:
        parts = key.split(".")
        if "experts" in parts and parts[parts.index("experts") + 1].isdecimal():
            place = parts.index("experts") + 1
            parts[place] = str([1, 2][int(parts[place])])
            assert torch.equal(after[key], more[".".join(parts)])
        elif after[key].shape != more[key].shape:
            assert torch.equal(after[key], more[key][[1, 2]])
        else:
            assert torch.equal(after[key], more[key])
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]


@pytest.mark.parametrize(
    ("name", "spelled", "as_released"),
    [("qwen3_moe", "num_local_experts", "num_experts"), ("deepseek_v3", "n_routed_experts", "num_local_experts")],
)
def test_config_says_it_in_the_field_that_it_had(
    name: str, spelled: str, as_released: str, shrink: Callable[..., Any], tmp_path: Path
) -> None:
    source = save_random(tiny_config(name), tmp_path / "model")
    fields = {as_released if key == spelled else key: value for key, value in config(source).items()}
    (source / "config.json").write_text(json.dumps(fields))
    shrink(source, experts=3)
    assert config(tmp_path / "out") == fields | {as_released: 3}


def test_a_source_in_8_bits_is_shrunk_as_what_it_stands_for(shrink: Callable[..., Any], tmp_path: Path) -> None:
    source = save_random(tiny_config("qwen3_moe", dtype="bfloat16"), tmp_path / "model", shard="5GB")
    stored: dict[str, Tensor] = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        scale = tensor.abs().amax() / 448
        encoded = {key: (tensor / scale).to(torch.float8_e4m3fn), f"{key}_scale_inv": scale.float()}
        stored |= encoded if ".experts." in key else {key: tensor.bfloat16()}
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    block = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}
    (source / "config.json").write_text(json.dumps(config(source) | block))
    report = shrink(source, experts=3, refit=False)
    after, kept = tensors(tmp_path / "out"), report.blocks[0].rows["experts"]["kept"]
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    for number, expert in enumerate(kept):
        whole = stored[name.format(expert)].float() * stored[f"{name.format(expert)}_scale_inv"]
        assert torch.equal(after[name.format(number)], whole.bfloat16())
    assert "quantization_config" not in config(tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(IDS, max_new_tokens=2)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "llama4"])
def test_a_model_that_wraps_a_language_model_keeps_the_rest_as_it_is(
    name: str, shrink: Callable[..., Any], tmp_path: Path
) -> None:
    source = save_wrapped(name, tmp_path / "model")
    shrink(source, experts=3)
    load(tmp_path / "out")
    before, after = config(source), config(tmp_path / "out")
    text = [key for key in before["text_config"] if before["text_config"][key] != after["text_config"][key]]
    assert len(text) == 1 and after["text_config"][text[0]] == 3
    assert before | {"text_config": None} == after | {"text_config": None}
    whole, less = tensors(source), tensors(tmp_path / "out")
    assert all(torch.equal(whole[key], less[key]) for key in whole if "language_model" not in key)


@pytest.mark.parametrize(
    ("family", "changes", "keys", "message"),
    [
        ("qwen3_moe", {}, {"experts": 5}, "--experts 5: there are 4; ask for fewer"),
        ("qwen3_moe", {}, {"experts": 4}, "--experts 4: that is all 4, nothing would go; ask for fewer"),
        ("qwen3_moe", {}, {"experts": "90%"}, "--experts 90%: that is all 4, nothing would go; ask for fewer"),
        ("qwen3_moe", {}, {"experts": 1}, "--experts 1: 1 stay, but each token is sent to 2; ask for 2 or more"),
        (
            "deepseek_v3",
            {"n_routed_experts": 12, "n_group": 3, "topk_group": 2},
            {"experts": 7},
            "--experts 7: its router chooses among 3 groups of experts, which lose equally many; ask for a multiple of 3",
        ),
        (
            "deepseek_v3",
            {"n_routed_experts": 12, "n_group": 3, "topk_group": 1, "num_experts_per_tok": 3},
            {"experts": 6},
            "--experts 6: a token is sent to 3 experts of 1 of 3 groups, so 9 have to stay; ask for 9 or more",
        ),
        (
            "llama",
            {},
            {"experts": "75%"},
            "llama has no routed experts; --experts takes nothing out: make it a mixture",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line_and_nothing_is_written(
    family: str,
    changes: dict[str, Any],
    keys: dict[str, Any],
    message: str,
    shrink: Callable[..., Any],
    tmp_path: Path,
) -> None:
    source = save_random(tiny_config(family, **changes), tmp_path / "model")
    with pytest.raises((RecipeError, CheckpointError)) as error:
        shrink(source, **keys)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
