"""`activations` as a user runs it: the same weights, thresholds beside them, and a model that leaves inputs out."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.models.thresholds import MEANS, read_thresholds
from llmsparse.runs.progress import Silent

SMALL: dict[str, Any] = {"calibration_samples": 8, "seq_len": 32, "batch_size": 4, "device": "cpu"}
IDS = torch.arange(60).view(2, 30) * 5 % 384


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    file = tmp_path_factory.mktemp("text") / "sample.txt"
    file.write_text(text[:60_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def dense(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("activations") / "dense", shards=2)


@pytest.fixture(scope="module")
def cut(dense: Path, sample: Path) -> Path:
    out = dense.with_name("cut")
    llmsparse.activations(dense, output=out, sparsity=0.5, calibration=sample, **SMALL)
    return out


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)


def weights(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def by_hand(folder: Path) -> Tensor:
    """Logits of the dense model with hooks that leave out what the config says, by the equations."""
    model = loaded(folder)
    rules = json.loads((folder / "config.json").read_text())["llmsparse"]["activations"]
    means = load_file(folder / MEANS) if rules["bias"] != "none" else {}

    def leave_out(name: str, rule: dict[str, float]) -> Callable[..., Tensor]:
        def run(module: Any, args: Any, output: Tensor) -> Tensor:
            x, weight = args[0], module.weight
            centre = means[name] if rules["bias"] == "centre" else torch.zeros(weight.shape[1])
            moved = x - centre
            score = moved.abs() * (weight.norm(dim=0) if rules["score"] == "wina" else 1)
            kth = score.sort(-1, descending=True).values[..., int(rule.get("keep", 1)) - 1, None]
            counts = score >= kth if "keep" in rule else score > rule["threshold"]
            extra = weight @ means[name] if name in means else 0
            return (moved * counts) @ weight.T + extra

        return run

    for name, rule in rules["layers"].items():
        model.get_submodule(name).register_forward_hook(leave_out(name, rule))
    return logits(model)


def test_other_software_finds_the_dense_model(dense: Path, cut: Path) -> None:
    before, after = weights(dense), weights(cut)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (dense, cut))
    assert one == {key: value for key, value in other.items() if key != "llmsparse"}
    assert torch.equal(logits(loaded(dense)), logits(loaded(cut)))


@pytest.mark.parametrize("keys", [
    {}, {"rule": "topk", "bias": "none"}, {"score": "teal", "bias": "fold", "allocation": "uniform"},
])  # fmt: skip
def test_through_llmsparse_inputs_are_left_out_as_the_equations_say(
    keys: dict[str, Any], dense: Path, sample: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    report = llmsparse.activations(dense, output=out, sparsity=0.6, calibration=sample, **SMALL, **keys)
    model = loaded(out, quantization_config=llmsparse.SparseConfig())
    assert torch.allclose(logits(model), by_hand(out), atol=1e-4)
    assert not torch.allclose(logits(model), logits(loaded(dense)), atol=1e-2)
    assert report.sparsity == pytest.approx(0.6, abs=1e-6)
    assert report.perplexity is not None


def test_eval_measures_with_the_thresholds(cut: Path, dense: Path, sample: Path) -> None:
    options: dict[str, Any] = {"seq_len": 32, "windows": 4, "device": "cpu"}
    found, whole = (llmsparse.perplexity(folder, sample, **options) for folder in (cut, dense))
    assert found.protocol["activation sparsity"] == 0.5 and "activation sparsity" not in whole.protocol
    model = loaded(cut, quantization_config=llmsparse.SparseConfig())
    assert found.perplexity != whole.perplexity
    from llmsparse.models.origin import load_tokenizer
    from llmsparse.text.windows import load_evaluation

    ids = load_evaluation(str(sample), load_tokenizer(cut), seq_len=32, limit=4).ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert found.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)


def test_generate_and_a_saved_copy_leave_the_same_out(cut: Path, tmp_path: Path) -> None:
    model = loaded(cut, quantization_config=llmsparse.SparseConfig())
    model.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved", quantization_config=llmsparse.SparseConfig())
    assert torch.equal(logits(model), logits(again))
    shutil.copy(cut / "tokenizer.json", tmp_path / "saved")
    text = llmsparse.generate(str(cut), "import", max_new_tokens=8, device="cpu").text
    new = model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False)
    assert isinstance(text, str) and new.shape == (1, 4)


def test_of_a_pruned_and_of_a_packed_model(
    dense: Path, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"calibration": str(sample), **SMALL}
    llmsparse.prune(dense, output=tmp_path / "pruned", sparsity=0.7, method="magnitude", match_steps=0, **keys)
    llmsparse.pack(str(tmp_path / "pruned"), tmp_path / "packed")
    for name in ("pruned", "packed"):
        llmsparse.activations(tmp_path / name, output=tmp_path / f"{name}-cut", sparsity=0.5, **keys)
    rules = [
        json.loads((tmp_path / f"{name}-cut" / "config.json").read_text())["llmsparse"] for name in ("pruned", "packed")
    ]
    assert rules[0] == rules[1]
    monkeypatch.setenv("LLMSPARSE_BACKEND", "dense")
    packed = loaded(tmp_path / "packed-cut")
    assert torch.allclose(logits(packed), by_hand(tmp_path / "pruned-cut"), atol=1e-4)
    assert main(["inspect", str(tmp_path / "packed-cut"), "--verify", "-q"]) == 0
    llmsparse.unpack(str(tmp_path / "packed-cut"), tmp_path / "unpacked")
    assert json.loads((tmp_path / "unpacked" / "config.json").read_text())["llmsparse"] == rules[0]
    llmsparse.pack(str(tmp_path / "pruned-cut"), tmp_path / "packed-after")
    after = loaded(tmp_path / "packed-after")
    assert torch.equal(logits(after), logits(packed))
    assert torch.allclose(logits(after.dequantize()), logits(packed), atol=1e-5)


class Looks(Silent):
    """Counts, as each measuring begins, the samples of earlier ones that are still held."""

    def __init__(self, rows: int) -> None:
        self.rows, self.held = rows, list[int]()

    def batches(self, description: str, total: int) -> Callable[[], None]:
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) is Tensor]
        self.held.append(sum(one.dim() == 2 and one.shape[0] == self.rows for one in tensors))
        return lambda: None


def test_samples_are_let_go_of_before_others_are_taken(dense: Path, sample: Path, tmp_path: Path) -> None:
    looks = Looks(7 * 31)  # all that enters a layer is in its sample
    keys: dict[str, Any] = SMALL | {"calibration_samples": 7, "seq_len": 31, "batch_size": 7}
    llmsparse.activations(dense, output=tmp_path / "o", sparsity=0.5, calibration=sample, progress=looks, **keys)
    assert len(looks.held) > 4 and not any(looks.held)


def test_errors_are_measured_on_as_much_text_whatever_the_batches(dense: Path, sample: Path, tmp_path: Path) -> None:
    found: list[list[float | None]] = []
    for size in (1, 16):
        keys: dict[str, Any] = SMALL | {"calibration_samples": 16, "seq_len": 32, "batch_size": size}
        llmsparse.activations(dense, output=tmp_path / str(size), sparsity=0.5, calibration=sample, **keys)
        report = json.loads((tmp_path / str(size) / "llmsparse_report.json").read_text(encoding="utf-8"))
        found.append([block["error"] for block in report["blocks"]])
    assert found[0] == pytest.approx(found[1], rel=1e-2)


class Stopped(Silent):
    """Ctrl-C as the second block begins."""

    def __init__(self) -> None:
        self.left = 2

    def block(self, name: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(dense: Path, cut: Path, sample: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"output": tmp_path / "cut", "sparsity": 0.5, "calibration": sample, **SMALL}
    with pytest.raises(KeyboardInterrupt):
        llmsparse.activations(dense, progress=Stopped(), **keys)
    assert not (tmp_path / "cut").exists()
    llmsparse.activations(dense, resume=True, **keys)
    for file in cut.iterdir():
        if file.name not in ("llmsparse_report.json", "llmsparse_recipe.yaml", "README.md"):
            assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes(), file.name


UP = "model.layers.0.mlp.up_proj"


def damages() -> Iterator[tuple[Callable[[dict[str, Any]], None], str]]:
    yield lambda block: block.update(version=9), "reads up to 1"
    yield lambda block: block.update(score="best"), "damaged"
    yield lambda block: block["layers"].update({"model.layers.0.mlp.up_proj": {"threshold": "x"}}), "damaged"
    yield lambda block: block["layers"].update({"model.layers.7.mlp.up_proj": {"threshold": 1.0}}), "up_proj"
    yield lambda block: block["layers"].update({UP: {"threshold": [1.0, 2.0]}}), "2 thresholds for one matrix"
    yield lambda block: block["layers"].update({UP: {"threshold": 10**400}}), "damaged"
    yield lambda block: block["layers"].clear(), "damaged"
    yield lambda block: block["layers"].pop(UP), f"holds the inputs of {UP}, which config.json gives no rule"
    yield lambda block: block.update(bias="none"), "says that nothing stands for inputs left out"
    yield lambda block: block.update(sparsity=float("nan")), "damaged"
    yield lambda block: block.update(sparsity=10**400), "damaged"
    yield lambda block: block["layers"].update({UP: {"keep": 500}}), r"lets 500 inputs of a token count, .* has 32"


@pytest.mark.parametrize(("damage", "said"), list(damages()))
def test_damaged_thresholds_are_one_line(damage: Callable[[Any], None], said: str, cut: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cut, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    damage(config["llmsparse"]["activations"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        loaded(folder, quantization_config=llmsparse.SparseConfig())


@pytest.mark.parametrize("damaged", [{"activations": []}, {"activations": None}, []])
def test_thresholds_that_are_no_table_are_not_passed_over(damaged: Any, cut: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cut, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"llmsparse": damaged}))
    with pytest.raises(CheckpointError, match="is damaged"):
        loaded(folder, quantization_config=llmsparse.SparseConfig())


@pytest.mark.parametrize(("damaged", "said"), [
    (torch.full((32,), torch.nan), "are NaN or Inf"), (torch.full((32,), torch.inf), "are NaN or Inf"),
    (torch.zeros(2, 32), r"has \[2, 32\] inputs of it, the weight \[32\]"),
])  # fmt: skip
def test_damaged_centres_are_one_line(damaged: Tensor, said: str, cut: Path, sample: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cut, tmp_path / "damaged")
    save_file(load_file(folder / MEANS) | {UP: damaged}, folder / MEANS)
    with pytest.raises(CheckpointError, match=said):
        loaded(folder, quantization_config=llmsparse.SparseConfig())
    with pytest.raises(CheckpointError, match=said):
        llmsparse.perplexity(folder, sample, seq_len=32, windows=1, device="cpu")


def test_thresholds_of_no_block_are_one_line_for_eval_too(cut: Path, sample: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cut, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    block = config["llmsparse"]["activations"]
    block["layers"] = {"model.layers.9.mlp.up_proj": {"threshold": 1.0}} | block["layers"]
    (folder / "config.json").write_text(json.dumps(config))
    means = load_file(folder / MEANS)
    save_file(means | {"model.layers.9.mlp.up_proj": means[UP].clone()}, folder / MEANS)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.9\.mlp\.up_proj: .*no layer of a block"):
        llmsparse.perplexity(folder, sample, seq_len=32, windows=1, device="cpu")


def test_a_model_with_thresholds_is_not_profiled(cut: Path, sample: Path) -> None:
    with pytest.raises(CheckpointError, match="has thresholds of activations already"):
        llmsparse.profile(cut, sample, samples=2, seq_len=32, device="cpu")


def test_centres_that_are_missing_are_one_line(cut: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cut, tmp_path / "damaged")
    (folder / MEANS).unlink()
    with pytest.raises(CheckpointError, match=MEANS):
        read_thresholds(folder, json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("share", [1, -0.1, 1.5, "half", True])
def test_a_share_that_cannot_be_is_one_line(share: Any) -> None:
    with pytest.raises(RecipeError, match="wanted a share of inputs to leave out"):
        llmsparse.ActivationsRecipe(model="m", sparsity=share)


def test_no_share_at_all_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["activations", "builtin"]) == 2
    assert "give --sparsity 0.5" in capsys.readouterr().err


VERBS: dict[str, dict[str, Any]] = {
    "activations": {"sparsity": 0.5}, "prune": {"sparsity": 0.5}, "quantize": {"bits": 3.0}, "shrink": {"ffn": "50%"},
    "factorize": {}, "scores": {}, "tune": {},
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_with_thresholds_is_no_source(verb: str, cut: Path, dense: Path, sample: Path, tmp_path: Path) -> None:
    text = {"text": str(sample), "teacher": str(dense)} if verb == "tune" else {"calibration": str(sample)}
    with pytest.raises(CheckpointError, match="has thresholds of activations already"):
        getattr(llmsparse, verb)(model=str(cut), output=str(tmp_path / "o"), **VERBS[verb] | text)
    assert not any(tmp_path.iterdir())


def test_weights_in_anothers_encoding_are_refused(dense: Path, sample: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense, tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CheckpointError, match="stored as fp8"):
        llmsparse.activations(folder, output=tmp_path / "o", sparsity=0.5, calibration=sample, **SMALL)
