"""Narrower FFNs and fewer heads: what is cut is gone, what stays is what it was, and what cannot be cut is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.shrinking.ffn import step_of
from tests.architectures import random_model, tiny_config
from tests.shrinking.small_models import load, logits, random_folder, saved, shrink

DOWN = ("down_proj.weight", "fc2.weight", "mlp.experts.down_proj", "dense_4h_to_h.weight")
OUT = ("o_proj.weight", "self_attn.dense.weight")


def silence(model: Any, names: tuple[str, ...], pieces: int, silent: int) -> None:
    """Zero, in every matrix with one of these names (and of each expert), the input columns of `silent` random pieces."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(names):
            transposed = name.endswith("experts.down_proj") and model.config.model_type == "gpt_oss"
            matrices = parameter if parameter.dim() == 3 else parameter[None]
            for matrix in matrices:  # (out, in), or (in, out)
                columns = (matrix.T if transposed else matrix).data
                size = columns.shape[1] // pieces if pieces else 1
                chosen = torch.randperm(columns.shape[1] // size, generator=generator)[:silent]
                for piece in chosen.tolist():
                    columns[:, piece * size : (piece + 1) * size] = 0


@pytest.mark.parametrize(
    ("name", "refit"),
    [("llama", False), *((name, True) for name in ("qwen3", "gemma2", "phi3", "opt", "gpt_oss", "qwen3_moe"))],
)
def test_cutting_channels_that_add_nothing_changes_no_logit(name: str, refit: bool, tmp_path: Path) -> None:
    model = random_model(tiny_config(name))
    width = 24 if name == "qwen3_moe" else 48
    silence(model, DOWN, 0, width // 3)
    saved(model, tmp_path)
    shrink(tmp_path, ffn="66.7%", refit=refit)
    made = load(tmp_path / "out")
    assert made.config.to_dict() != model.config.to_dict()
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(logits(made), logits(model), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "gpt_oss", "deepseek_v3"])
def test_cutting_heads_that_add_nothing_changes_no_logit(name: str, tmp_path: Path) -> None:
    changes = {} if name == "deepseek_v3" else {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = random_model(tiny_config(name, **changes))
    silence(model, OUT, 4, 2)
    saved(model, tmp_path)
    shrink(tmp_path, heads="50%")
    made = load(tmp_path / "out")
    assert made.config.num_attention_heads == model.config.num_attention_heads // 2
    assert made.config.num_key_value_heads == 2
    torch.testing.assert_close(logits(made), logits(model), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"ffn": "50%", "heads": "50%", "blocks": "50%"}),
        ("gemma2", {"ffn": "50%", "heads": "50%", "blocks": "3"}),
        ("phi3", {"ffn": "50%", "heads": "50%", "match_steps": 4}),
        ("qwen3_moe", {"ffn": "50%", "heads": "50%", "blocks": "1", "experts": "3"}),
        ("gpt_oss", {"ffn": "50%", "blocks": "2", "experts": "50%"}),
        ("deepseek_v3", {"ffn": "50%", "heads": "50%"}),
        ("qwen2_moe", {"ffn": "50%", "experts": "75%"}),
    ],
)
def test_several_reductions_make_one_model_that_loads(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    report = shrink(random_folder(tiny_config(name), tmp_path), **keys)
    made = load(tmp_path / "out")
    assert set(report.stored()["shrunk"]) == keys.keys() - {"match_steps"}
    assert report.perplexity is not None
    stored = {tensor.data_ptr(): tensor.numel() for tensor in made.state_dict().values()}
    assert report.parameters[1] == sum(stored.values())


def test_the_width_of_a_head_is_written_out_where_it_was_left_to_be_derived(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    folder = random_folder(config, tmp_path)
    file = folder / "model" / "config.json"
    raw = json.loads(file.read_text())
    assert raw.pop("head_dim") == config.hidden_size // config.num_attention_heads
    file.write_text(json.dumps(raw))
    shrink(folder, heads="50%")
    written = json.loads((folder / "out" / "config.json").read_text())
    assert (written["num_attention_heads"], written["num_key_value_heads"], written["head_dim"]) == (2, 1, 8)
    load(folder / "out")


def test_the_channels_that_stay_are_those_of_the_most_output_energy(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    folder = saved(model, tmp_path)
    report = shrink(folder, ffn="16", refit=False)
    made = load(folder / "out")

    seen: list[Tensor] = []
    layer = model.model.layers[0].mlp
    layer.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    from safetensors.torch import load_file

    ids = load_file(folder / "windows.safetensors")["input_ids"][:12]
    with torch.no_grad():
        model(ids)
    energy = torch.cat(seen).square().sum(0) * layer.down_proj.weight.square().sum(0)
    kept = energy.argsort(descending=True)[:16].sort().values
    assert torch.equal(made.model.layers[0].mlp.down_proj.weight, layer.down_proj.weight[:, kept])
    assert torch.equal(made.model.layers[0].mlp.up_proj.weight, layer.up_proj.weight[kept])
    row = report.rows(report.reductions[0])[0][1]["units"][0]
    assert row["energy"] == pytest.approx((energy[kept].sum() / energy.sum()).item(), rel=1e-4)


def test_refit_brings_the_output_closer_on_tokens_held_back(tmp_path: Path) -> None:
    report = shrink(random_folder(tiny_config("llama"), tmp_path), ffn="50%")
    parts = [part for _, row in report.rows(report.reductions[0]) for part in row["units"]]
    assert all(part["error"] < part["error_cut"] for part in parts)
    assert "after refit" in dict(report.findings())["ffn"]


@pytest.mark.parametrize(("width", "step"), [(48, 8), (172, 8), (704, 64), (768, 64), (11008, 64), (1001, 8)])
def test_widths_are_multiples_that_kernels_like(width: int, step: int) -> None:
    assert step_of(width) == step


@pytest.mark.parametrize(
    ("name", "keys", "error", "why"),
    [
        ("llama", {"ffn": "64"}, RecipeError, "--ffn 64: there are 48; ask for fewer"),
        ("llama", {"ffn": "48"}, RecipeError, "nothing would go"),
        ("llama", {"ffn": "99%"}, RecipeError, "--ffn 99%: that is all 48, nothing would go"),
        ("qwen2_moe", {"ffn": "16"}, RecipeError, "FFNs of several widths"),
        ("gpt2", {"ffn": "50%"}, CheckpointError, "the FFNs of gpt2 cannot be made narrower"),
        ("mamba", {"ffn": "50%"}, CheckpointError, "cannot be made narrower"),
        ("llama", {"heads": "75%"}, RecipeError, "75% of them are no whole groups; use --heads 2"),
        ("llama", {"heads": "3"}, RecipeError, "no whole groups"),
        ("llama", {"heads": "8"}, RecipeError, "there are 4"),
        ("llama", {"heads": "4"}, RecipeError, "nothing would go"),
        ("mamba", {"heads": "50%"}, CheckpointError, "no attention heads"),
        ("olmo2", {"heads": "50%"}, CheckpointError, "q_norm.weight goes over all heads together"),
        ("olmoe", {"heads": "50%"}, CheckpointError, "the attention of olmoe cannot be made narrower"),
        ("gpt_neox", {"heads": "50%"}, CheckpointError, "the attention of gpt_neox cannot be made narrower"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    name: str, keys: dict[str, str], error: type[Exception], why: str, tmp_path: Path
) -> None:
    folder = random_folder(tiny_config(name), tmp_path)
    with pytest.raises(error) as raised:
        shrink(folder, **keys)
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in folder.iterdir()) == ["model", "windows.safetensors"]


@pytest.mark.parametrize(("name", "does"), [("llama", True), ("phi3", True), ("gemma2", False)])
def test_a_fit_makes_up_for_the_blocks_before_where_it_adds_to_the_output(
    name: str, does: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block of a model that lost channels in the first: with nothing to make up for, its matrix comes out otherwise."""
    folder = random_folder(tiny_config(name), tmp_path)
    shrink(folder, ffn="50%")
    made = load(folder / "out")
    monkeypatch.setattr("llmsparse.shrinking.projection.PULL", 0.0)
    shrink(folder, ffn="50%", overwrite=True)
    other = load(folder / "out")
    first, *_, last = [layer.mlp.down_proj.weight for layer in made.model.layers]
    assert torch.equal(first, other.model.layers[0].mlp.down_proj.weight)
    assert torch.equal(last, other.model.layers[-1].mlp.down_proj.weight) != does
