"""`untied`: the same model with a head of its own, whichever way it was tied, to be quantized like any other matrix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_random, stream, tiny_config, windows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig
from wrapped import load, save_wrapped

import llmsparse
from llmsparse.inference.load import load_model
from llmsparse.models.streamed import StreamedModel
from llmsparse.models.untied import untied
from llmsparse.packing.folder import PackedCheckpoint
from llmsparse.runs.progress import Silent
from llmsparse.storage.checkpoint import CheckpointReader

SMALL: dict[str, Any] = {"calibration": "builtin", "calibration_samples": 4, "seq_len": 32, "device": "cpu"}
FILE = "model.safetensors"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logits(model: StreamedModel) -> torch.Tensor:
    acts = model.embed(windows((2, 24)))
    for block in model.blocks():
        block.run(acts, into=acts)
    return model.logits(acts.hidden[0])


@pytest.mark.parametrize("held", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_it_computes_the_same(family: str, held: str, here: Path) -> None:
    folder = save_random(tiny_config(family, tie_word_embeddings=True), here / "tied", shard="1GB")
    stored = load_file(folder / FILE)
    save_file(stored | {held: stored.pop("model.embed_tokens.weight")}, folder / FILE, metadata={"format": "pt"})
    tied = stream(folder)
    model, reader, config = untied(tied, CheckpointReader(folder), False)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(reader.keys())
    assert model.tied_head is None and config.raw["tie_word_embeddings"] is False
    assert [weight.name for weight in model.head_weights()] == ["lm_head"]
    assert torch.equal(logits(model), logits(tied))


def test_a_bias_that_is_tied_beside_it_comes_along(here: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    save_random(BertConfig(vocab_size=384, is_decoder=True, **sizes), here / "bert", shard="1GB")
    tied = stream(here / "bert")
    model, reader, _ = untied(tied, CheckpointReader(here / "bert"), False)
    assert "cls.predictions.decoder.bias" in reader.keys() and model.tied_head is None
    assert torch.equal(logits(model), logits(tied))


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_in_a_model_that_wraps_one(family: str, here: Path, tokenizer_folder: Path) -> None:
    folder = save_wrapped(family, here / "wrapped", tokenizer_folder)
    was = load(folder)
    tied = was.get_output_embeddings().weight is was.get_input_embeddings().weight
    assert tied == (family == "gemma3"), "one of each kind"
    llmsparse.quantize(str(folder), bits=4, head_bits=8, output="out", **SMALL)
    llmsparse.unpack("out", "dense")
    made = json.loads(Path("dense/config.json").read_text())
    assert made["tie_word_embeddings"] is False and made["text_config"].get("tie_word_embeddings", False) is False
    model = load(here / "dense")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head.data_ptr() != embedding.data_ptr()
    if tied:
        close = torch.nn.functional.cosine_similarity(head, embedding, dim=1)
        assert not torch.equal(head, embedding) and close.min() > 0.999, "the embedding once more, in 8 bits"


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return {key: tensor for file in Path(folder).glob("*.safetensors") for key, tensor in load_file(file).items()}


def test_a_tied_head_is_quantized_as_one_of_its_own(tiny_llama: Callable[..., Path], here: Path) -> None:
    tied = tiny_llama(here / "tied", hidden=64, ffn=96, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tied, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(here / "untied")
    for file in tied.glob("tok*"):
        (here / "untied" / file.name).write_bytes(file.read_bytes())
    for name in ("tied", "untied"):
        llmsparse.quantize(name, bits=3, head_bits=8, output=f"{name}-bits", **SMALL)
    got, want = tensors("tied-bits"), tensors("untied-bits")
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    assert torch.equal(got["model.embed_tokens.weight"], tensors("tied")["model.embed_tokens.weight"])
    assert PackedCheckpoint(Path("tied-bits")).weight("lm_head.weight").shape == (384, 64)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_what_is_unpacked_is_what_runs(tiny_llama: Callable[..., Path], here: Path) -> None:
    tied = tiny_llama(here / "tied", hidden=64, ffn=96)
    llmsparse.quantize(str(tied), bits=3, head_bits=6, output="out", **SMALL)
    llmsparse.unpack("out", "dense")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        packed = load_model(Path("out"), backend="dense", device=torch.device("cpu"))(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained("dense")(ids).logits, packed)
        before = AutoModelForCausalLM.from_pretrained(tied)(ids).logits
    assert not torch.equal(packed, before)


class StopAtHead(Silent):
    def block(self, name: str) -> None:
        if name == "head":
            raise KeyboardInterrupt


def test_a_broken_off_run_goes_on_to_the_same_bytes(tiny_llama: Callable[..., Path], here: Path) -> None:
    tied = str(tiny_llama(here / "tied", hidden=64, ffn=96))
    keys: dict[str, Any] = {"bits": 3, "head_bits": 4, **SMALL}
    llmsparse.quantize(tied, output="whole", **keys)
    with pytest.raises(KeyboardInterrupt):
        llmsparse.quantize(tied, output="out", **keys, progress=StopAtHead())
    llmsparse.quantize(tied, output="out", **keys, resume=True)
    assert (here / "out" / FILE).read_bytes() == (here / "whole" / FILE).read_bytes()
