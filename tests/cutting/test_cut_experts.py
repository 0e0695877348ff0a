"""`activations` of mixtures: every expert leaves out inputs by thresholds of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.backends.cpu_columns import TOKENS
from llmsparse.cli.app import main
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.inference.cut_experts import cut_stacks
from llmsparse.inference.load import load_model
from llmsparse.models.thresholds import MEANS
from tests.architectures import VOCABULARY, save_random, tiny_config

SEEN = 80  # tokens to calibrate on: a threshold is a score of one of them, and others are not equal to it
IDS = SEEN + torch.arange(40).view(2, 20) * 7 % (VOCABULARY - SEEN)
SMALL: dict[str, Any] = {"calibration_samples": 6, "seq_len": 32, "batch_size": 3, "device": "cpu", "dtype": "float32"}
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    ids = torch.randint(3, SEEN, (24, 32), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, file)
    return file


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tiny_config("qwen3_moe"), tmp_path_factory.mktemp("mixture") / "dense")


@pytest.fixture(scope="module")
def cut(dense: Path, tokens: Path) -> Path:
    out = dense.with_name("cut")
    llmsparse.activations(dense, output=out, sparsity=0.5, calibration=str(tokens), **SMALL)
    return out


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def block_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["llmsparse"]["activations"]


def multiplied(
    rules: dict[str, Any], means: dict[str, Tensor], name: str, expert: int, weight: Tensor, x: Tensor
) -> Tensor:
    """One token's x (in,) with a weight (out, in), as the equations say."""
    rule = rules["layers"].get(name)
    if rule is None:
        return weight @ x
    mean = means[name][expert] if name in means else torch.zeros(len(x))
    moved = x - mean if rules["bias"] == "centre" else x
    score = moved.abs() * (weight.norm(dim=0) if rules["score"] == "wina" else 1)
    kth = score.sort(descending=True).values[rule.get("keep", 1) - 1]
    counts = score >= kth if "keep" in rule else score > rule["threshold"][expert]
    return weight @ (moved * counts) + weight @ mean


def by_hand(folder: Path) -> Tensor:
    """Logits of the dense model whose experts run token by token, by the equations; linear layers through hooks."""
    model, rules = loaded(folder), block_of(folder)
    means = load_file(folder / MEANS) if rules["bias"] != "none" else {}

    def of_experts(name: str, module: Any) -> Any:
        def run(hidden: Tensor, index: Tensor, shares: Tensor) -> Tensor:
            out = torch.zeros_like(hidden)
            for token, (chosen, share) in enumerate(zip(index.tolist(), shares.tolist(), strict=True)):
                for expert, part in zip(chosen, share, strict=True):
                    up, down = module.gate_up_proj[expert], module.down_proj[expert]
                    if module.is_transposed:
                        up, down = up.T, down.T
                    inner = multiplied(rules, means, f"{name}.gate_up_proj", expert, up, hidden[token])
                    inner = inner + module.gate_up_proj_bias[expert] if module.has_bias else inner
                    y = multiplied(rules, means, f"{name}.down_proj", expert, down, module._apply_gate(inner[None])[0])
                    out[token] += part * (y + module.down_proj_bias[expert] if module.has_bias else y)
            return out

        return run

    def of_linear(name: str) -> Any:
        def run(module: Any, args: Any, output: Tensor) -> Tensor:
            x, weight, mean = args[0], module.weight, means.get(name, torch.zeros(module.weight.shape[1]))
            moved = x - mean if rules["bias"] == "centre" else x
            score = moved.abs() * (weight.norm(dim=0) if rules["score"] == "wina" else 1)
            rule = rules["layers"][name]
            kth = score.sort(-1, descending=True).values[..., rule.get("keep", 1) - 1, None]
            counts = score >= kth if "keep" in rule else score > rule["threshold"]
            bias = 0 if module.bias is None else module.bias
            return (moved * counts) @ weight.T + weight @ mean + bias

        return run

    for name, module in model.named_modules():
        if hasattr(module, "is_transposed"):
            module.forward = of_experts(name, module)
        elif name in rules["layers"]:
            module.register_forward_hook(of_linear(name))
    return logits(model)


@pytest.mark.parametrize(("family", "keys"), [
    ("qwen3_moe", {}), ("mixtral", {"score": "teal", "bias": "fold"}), ("olmoe", {"rule": "topk", "bias": "none"}),
    ("gpt_oss", {"allocation": "uniform"}), ("granitemoe", {"bias": "none"}),
])  # fmt: skip
def test_experts_leave_inputs_out_as_the_equations_say(
    family: str, keys: dict[str, Any], tokens: Path, tmp_path: Path
) -> None:
    folder = save_random(tiny_config(family), tmp_path / "dense")
    out = tmp_path / "cut"
    report = llmsparse.activations(folder, output=out, sparsity=0.6, calibration=str(tokens), **SMALL, **keys)
    model = loaded(out, quantization_config=llmsparse.SparseConfig())
    assert len(list(cut_stacks(model))) == 2 * model.config.num_hidden_layers
    assert torch.allclose(logits(model), by_hand(out), atol=1e-4)
    assert not torch.allclose(logits(model), logits(loaded(folder)), atol=1e-2)
    one = torch.cat([logits(model, IDS[:1, : number + 1])[:, -1:] for number in range(3)], dim=1)
    assert torch.allclose(one, logits(model)[:1, :3], atol=1e-4)  # by the kernel that reads columns, for few tokens
    assert report.sparsity == pytest.approx(0.6, abs=1e-3) and report.left_whole == 0


def test_the_shares_that_were_asked_for_are_met_by_every_expert(cut: Path, tokens: Path) -> None:
    rules, model = block_of(cut), loaded(cut)
    means = load_file(cut / MEANS)
    report = json.loads((cut / "llmsparse_report.json").read_text())
    shares = {layer["name"]: layer["share"] for block in report["blocks"] for layer in block["layers"]}
    met = {layer["name"]: layer["met"] for block in report["blocks"] for layer in block["layers"]}
    entering: dict[int, Tensor] = {}
    name = f"{EXPERTS}.gate_up_proj"
    experts = model.get_submodule(EXPERTS)

    def note(module: Any, args: Any) -> None:
        hidden, index, _ = args
        entering.update({one: hidden[(index == one).any(-1)] for one in range(4)})

    experts.register_forward_pre_hook(note)
    logits(model, load_file(tokens)["input_ids"][:6])
    for expert in range(4):
        weight, x = experts.gate_up_proj[expert], entering[expert] - means[name][expert]
        out = (x.abs() * weight.norm(dim=0) <= rules["layers"][name]["threshold"][expert]).float().mean().item()
        assert out == pytest.approx(shares[name], abs=0.06)
    assert met[name] == pytest.approx(2.0) and met["model.layers.0.self_attn.q_proj"] == 1.0


def test_other_software_finds_the_dense_model(dense: Path, cut: Path) -> None:
    assert torch.equal(logits(loaded(dense)), logits(loaded(cut)))


def test_eval_generate_and_a_saved_copy_leave_the_same_out(cut: Path, tmp_path: Path) -> None:
    model = loaded(cut, quantization_config=llmsparse.SparseConfig())
    ids = torch.randint(SEEN, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
    tokens = tmp_path / "others.safetensors"
    save_file({"input_ids": ids}, tokens)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    found = llmsparse.perplexity(cut, str(tokens), windows=4, device="cpu", dtype="float32")
    assert found.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved", quantization_config=llmsparse.SparseConfig())
    assert torch.equal(logits(model), logits(again))
    for experts in ("grouped_mm", "llmsparse"):
        with pytest.raises(RecipeError, match=r"experts leave inputs out, and run one by one; leave --experts out"):
            llmsparse.fuse(model, experts)
    assert torch.equal(logits(llmsparse.fuse(model)), logits(again))
    half = loaded(cut, quantization_config=llmsparse.SparseConfig()).to(torch.bfloat16)
    assert logits(half, IDS[:1, :1]).dtype == logits(half).dtype == torch.bfloat16
    half = half.to(torch.float32)
    assert (logits(half) - logits(model)).abs().mean() < 0.1


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_packed_experts_leave_out_the_same(
    dense: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"calibration": str(tokens), **SMALL}
    llmsparse.prune(dense, output=tmp_path / "pruned", sparsity=0.7, method="magnitude", match_steps=0, **keys)
    llmsparse.pack(str(tmp_path / "pruned"), tmp_path / "packed")
    llmsparse.activations(tmp_path / "packed", output=tmp_path / "cut", sparsity=0.5, **keys)
    llmsparse.unpack(str(tmp_path / "cut"), tmp_path / "unpacked")
    wanted = by_hand(tmp_path / "unpacked")
    monkeypatch.setenv("LLMSPARSE_BACKEND", "cpu-bitmask")
    model = loaded(tmp_path / "cut")
    assert torch.allclose(logits(model), wanted, atol=1e-4)
    assert torch.allclose(logits(model, IDS[:1, :1]), wanted[:1, :1], atol=1e-4)
    assert [tokens for _, _, tokens in cut_stacks(model)] == [TOKENS] * 4
    assert (logits(model.to(torch.bfloat16).to(torch.float32)) - wanted).abs().mean() < 0.1
    assert [tokens for _, _, tokens in cut_stacks(model)] == [TOKENS] * 4
    assert torch.allclose(logits(loaded(tmp_path / "cut").dequantize()), wanted, atol=1e-4)
    monkeypatch.setenv("LLMSPARSE_BACKEND", "dense")
    model = loaded(tmp_path / "cut")
    assert torch.allclose(logits(model), wanted, atol=1e-4)
    assert [runs for _, *runs in cut_stacks(model)] == [["dense", None]] * 4
    monkeypatch.setenv("LLMSPARSE_BACKEND", "cpu-bitmask")
    on_disk = load_model(tmp_path / "cut", device=torch.device("cpu"), dtype="float32", expert_memory="125KB")
    assert torch.allclose(logits(on_disk), wanted, atol=1e-4)
    assert [runs for _, *runs in cut_stacks(on_disk)] == [["cpu-bitmask", None]] * 4


def test_an_expert_that_no_token_reached_has_its_layers_rule(tokens: Path, tmp_path: Path) -> None:
    folder = save_random(tiny_config("qwen3_moe", num_experts_per_tok=1), tmp_path / "lonely")
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        for key in held:
            if key.endswith("mlp.gate.weight"):
                held[key][1], held[key][3] = -held[key][0], 0  # of the first two one is above 0, where the last one is
        save_file(held, file, {"format": "pt"})
    keys: dict[str, Any] = {"calibration": str(tokens), "only": "*experts*", **SMALL}
    report = llmsparse.activations(folder, output=tmp_path / "cut", sparsity=0.5, **keys)
    model, entering = loaded(folder), list[Any]()
    experts = model.get_submodule(EXPERTS)
    experts.register_forward_pre_hook(lambda _, args: entering.append(args))
    logits(model, load_file(tokens)["input_ids"][:6])
    ((x, index, _),) = entering
    lonely = sorted({0, 1, 2, 3} - set(index.flatten().tolist()))
    assert lonely
    name = f"{EXPERTS}.gate_up_proj"
    share = next(layer.share for block in report.blocks for layer in block.layers if layer.name == name)
    centre, thresholds = load_file(tmp_path / "cut" / MEANS)[name], block_of(tmp_path / "cut")["layers"][name]
    for expert in lonely:
        assert torch.allclose(centre[expert], x.median(dim=0).values, atol=1e-5)
        found = ((x - centre[expert]).abs() * experts.gate_up_proj[expert].norm(dim=0)).flatten().sort().values
        assert thresholds["threshold"][expert] == pytest.approx(found[round(share * len(found)) - 1].item(), rel=1e-3)


@pytest.mark.parametrize(("thresholds", "said"), [
    ([0.1, 0.2], "2 thresholds for 4 experts"), ([], "damaged"), ([0.1, "x", 0.1, 0.1], "damaged"),
])  # fmt: skip
def test_thresholds_of_other_experts_are_one_line(thresholds: Any, said: str, cut: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cut, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    config["llmsparse"]["activations"]["layers"][f"{EXPERTS}.down_proj"] = {"threshold": thresholds}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        loaded(folder, quantization_config=llmsparse.SparseConfig())


def test_some_experts_of_a_layer_alone_are_refused(dense: Path, tokens: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"calibration": str(tokens), "exclude": "*experts.2.down_proj", **SMALL}
    with pytest.raises(RecipeError, match="one layer with others"):
        llmsparse.activations(dense, output=tmp_path / "o", sparsity=0.5, **keys)


def test_bench_says_why_experts_that_leave_inputs_out_are_not_measured(
    cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(cut), "--batch", "1", "--device", "cpu", "-q"]) != 0
    assert "leave inputs out, and run one by one, in one way only" in capsys.readouterr().err


def test_profile_covers_experts(dense: Path, tokens: Path) -> None:
    found = llmsparse.profile(dense, tokens, samples=6, seq_len=32, device="cpu", dtype="float32")
    model, seen = loaded(dense), dict[int, Tensor]()
    experts = model.get_submodule(EXPERTS)

    def note(module: Any, args: Any) -> None:
        hidden, index, _ = args
        seen.update({one: hidden[(index == one).any(-1)] for one in range(4)})

    experts.register_forward_pre_hook(note)
    logits(model, load_file(tokens)["input_ids"][:6])
    halves: list[Tensor] = []
    for expert, x in seen.items():
        score = (x.abs() * experts.gate_up_proj[expert].norm(dim=0)).sort(dim=1).values
        halves.append(score[:, 16:].sum(1) / score.sum(1))
    entry = next(one for one in found.blocks["model.layers.0"] if one.name == f"{EXPERTS}.gate_up_proj")
    assert entry.experts == 4
    assert entry.half_holds == pytest.approx(torch.cat(halves).mean().item(), abs=1e-5)
    lazy = found.lazy("model.layers.0")
    assert lazy is not None and lazy.name == f"{EXPERTS}.down_proj"
