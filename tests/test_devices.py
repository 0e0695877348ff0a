"""Every verb from end to end on every kind of device: the same claims on a CPU and on a CUDA GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import random_model, tiny_config
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import llmsparse
from llmsparse.inference.load import load_model
from llmsparse.runs.progress import Silent

Build = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(tiny_llama: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("devices") / "llama", dtype=torch.bfloat16, hidden=64, ffn=128)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    file = tmp_path_factory.mktemp("devices") / "prose.txt"
    file.write_text(text[:30_000], encoding="utf-8")
    return file


@pytest.fixture
def small(prose: Path, device: str) -> dict[str, Any]:
    """Keys of a small run on the device."""
    return {"calibration": str(prose), "calibration_samples": 8, "seq_len": 32, "device": device, "dtype": "float32"}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "dsnot", "alps"])
def test_zeros_are_counted_to_the_last_one_and_have_no_sign(
    method: str, pattern: str, model: Path, small: dict[str, Any], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"pattern": pattern} if ":" in pattern else {"sparsity": 0.5}
    report = llmsparse.prune(
        model=str(model), output=str(tmp_path / "out"), method=method, match_steps=0, **asked, **small
    )
    after = tensors(tmp_path / "out")
    for row in report.rows:
        weight = after[f"{row.name}.weight"]
        assert (weight == 0).sum() == weight.numel() // 2 and not torch.signbit(weight[weight == 0]).any()
        if pattern == "2:4":
            assert ((weight.view(-1, 4) != 0).sum(1) <= 2).all()


def test_matching_lowers_the_error_of_blocks(model: Path, small: dict[str, Any], tmp_path: Path) -> None:
    report = llmsparse.prune(
        model=str(model), output=str(tmp_path / "out"), method="wanda", sparsity=0.6, match_steps=40, **small
    )
    matches = [block.match for block in report.blocks if block.match]
    assert matches and all(match["after"] < match["before"] for match in matches)


def test_a_run_that_is_broken_off_resumes_to_the_same_bytes(model: Path, small: dict[str, Any], tmp_path: Path) -> None:
    class BreaksOff(Silent):
        def block(self, name: str) -> None:
            if name.endswith("1"):
                raise KeyboardInterrupt

    keys: dict[str, Any] = small | {"model": str(model), "sparsity": 0.5, "match_steps": 4}
    llmsparse.prune(output=str(tmp_path / "whole"), **keys)
    with pytest.raises(KeyboardInterrupt):
        llmsparse.prune(output=str(tmp_path / "broken"), progress=BreaksOff(), **keys)
    llmsparse.prune(output=str(tmp_path / "broken"), resume=True, **keys)
    whole, broken = (tensors(tmp_path / name) for name in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(torch.equal(whole[key], broken[key]) for key in whole)


def test_perplexity_is_that_of_plain_transformers(model: Path, prose: Path, device: str) -> None:
    measured = llmsparse.perplexity(model, prose, seq_len=32, device=device, dtype="float32")
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(model)(prose.read_text(), verbose=False, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        logits = whole(windows).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert measured.perplexity == pytest.approx(loss.exp().item(), rel=1e-3)


def test_a_packed_model_writes_what_the_dense_one_writes(
    model: Path, small: dict[str, Any], device: str, tmp_path: Path
) -> None:
    llmsparse.prune(
        model=str(model), output=str(tmp_path / "out"), method="magnitude", pattern="2:4", match_steps=0, **small
    )
    llmsparse.pack(tmp_path / "out", tmp_path / "packed")
    ids = torch.arange(5, 21)[None].to(device)
    dense, packed = (
        load_model(tmp_path / name, device=torch.device(device), dtype="float32") for name in ("out", "packed")
    )
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, atol=2e-3, rtol=2e-3)
    text = llmsparse.generate(str(tmp_path / "packed"), "def ", max_new_tokens=4, device=device).text
    assert isinstance(text, str)


def test_factorize_and_tune_bring_a_mixture_closer_to_its_teacher(
    model: Path, small: dict[str, Any], prose: Path, device: str, tmp_path: Path
) -> None:
    llmsparse.factorize(
        model=str(model), output=str(tmp_path / "moe"), experts=8, shared=2, active=2, router_steps=20, **small
    )
    report = llmsparse.tune(
        model=str(tmp_path / "moe"), teacher=str(model), output=str(tmp_path / "tuned"), text=str(prose), seq_len=32,
        steps=30, learning_rate=3e-3, batch_size=8, device=device, dtype="float32",
    )  # fmt: skip
    assert report.losses[-1]["kl"] < report.losses[0]["kl"]


def test_experts_are_scored_and_taken_out(small: dict[str, Any], tokenizer_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "mixture"
    random_model(tiny_config("qwen3_moe", vocab_size=384)).save_pretrained(source)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(source)
    llmsparse.shrink(model=str(source), output=str(tmp_path / "out"), experts="3", **small)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loaded[1].values()) and loaded[0].config.num_experts == 3
