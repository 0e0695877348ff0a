"""`quantize`: as many bits as asked for, the same numbers wherever they are read, and the same bytes after a break."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packed_reader
import pytest
import torch
from architectures import random_model, tiny_config
from safetensors.torch import load_file
from sparse import save_sparse
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.backends.cpu import nested
from llmsparse.cli.app import main
from llmsparse.inference.linear import PackedMatrix
from llmsparse.inference.load import load_model
from llmsparse.inference.packed_experts import packed_weights
from llmsparse.packing.folder import PackedCheckpoint
from llmsparse.quantization.plan import make_plan
from llmsparse.quantization.recipe import QuantizeRecipe
from llmsparse.runs import recipe_file
from llmsparse.runs.progress import Silent
from tests.quantization.quantized import SMALL, weights_of


def stored_bits(folder: Path | str) -> float:
    weights = weights_of(folder).values()
    numel = sum(weight.numbers().numel() for weight in weights)
    return 8 * sum(tensor.nbytes for weight in weights for tensor in weight.tensors().values()) / numel


@pytest.mark.parametrize("bits", [2.3, 3.0])
def test_it_stores_as_many_bits_as_were_asked_for_and_planned(model: str, bits: float) -> None:
    plan = make_plan(QuantizeRecipe(model=model, bits=bits, output="out", **SMALL))
    report = llmsparse.quantize(model, bits=bits, output="out", **SMALL)
    assert stored_bits("out") == pytest.approx(bits, rel=0.02)  # tiles of 6144 places are all there are
    assert report.bits == pytest.approx(bits, abs=0.01) and len(report.rows) == len(weights_of("out")) == 14
    tensors = load_file("out/model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == pytest.approx(plan.bytes_to_write, rel=0.01)
    told = json.loads(Path("out/llmsparse_report.json").read_text())
    assert told["bits"] == report.bits and told["entropy"] < told["bits"] and 0.1 < told["zeros"] < 0.8
    assert report.perplexity and report.perplexity["after"] != report.perplexity["before"]
    PackedCheckpoint(Path("out")).verify()


def test_the_same_weights_are_computed_with_unpacked_and_read_by_the_page(model: str) -> None:
    llmsparse.quantize(model, bits=2.5, output="out", **SMALL)
    llmsparse.unpack("out", "dense")
    dense = load_file("dense/model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in dense.items()} == {
        name: (t.shape, t.dtype) for name, t in load_file(Path(model) / "model.safetensors").items()
    }
    loaded = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
    plain = AutoModelForCausalLM.from_pretrained("dense", dtype="auto")
    held = dict(packed_weights(loaded))
    by_page = packed_reader.read(Path("out"))
    for name, weight in weights_of("out").items():
        exact = weight.numbers().double() * weight.steps.double()
        assert torch.equal(dense[name], exact.to(torch.bfloat16))
        assert torch.equal(held[name].dense(), dense[name])
        assert np.array_equal(by_page[name], dense[name].view(torch.int16).numpy().view(np.uint16))
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, rtol=2e-2, atol=2e-2)
    loaded.save_pretrained("saved")
    assert json.loads(Path("saved/config.json").read_text())["quantization_config"]["format_version"] == 2
    again = load_file("saved/model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in load_file("out/model.safetensors").items())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_by_name_it_runs_with_activations_of_8_bits(model: str) -> None:
    llmsparse.quantize(model, bits=2.5, output="out", **SMALL)
    loaded = load_model(Path("out"), backend="cpu-nested-int8", device=torch.device("cpu"))
    plain = load_model(Path("out"), device=torch.device("cpu"))
    assert {held.choice.backend for _, held in packed_weights(loaded)} == {"cpu-nested-int8"}
    ids = torch.arange(4).view(1, -1)  # few enough for the kernel
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, rtol=5e-2, atol=5e-2)
    for _, held in packed_weights(loaded):  # too many tokens for 8 bits to gain: nothing is rounded
        assert isinstance(held, PackedMatrix)
        made, x = held.prepared, torch.randn(24, held.prepared.shape[-1]).to(held.dtype)
        by_kernel = nested.kernel_rows(made.frame.stored, made.dtype, made.wide) >= len(x)
        with torch.no_grad():
            assert torch.equal(held(x, None), nested.matvec(made, x) if by_kernel else linear(x, held.dense()))


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_experts_and_layers_that_store_inputs_first(family: str, tmp_path: Path) -> None:
    random_model(tiny_config(family)).to(torch.bfloat16).save_pretrained("source")
    torch.save({}, tmp_path / "unused")
    ids = torch.randint(0, 60, (6, 16), generator=torch.Generator().manual_seed(0))
    from safetensors.torch import save_file

    save_file({"input_ids": ids}, "ids.safetensors")
    llmsparse.quantize("source", bits=3.5, output="out", calibration="ids.safetensors", calibration_samples=4)
    weights = weights_of("out")
    assert any(len(weight.shape) == 3 for weight in weights.values()) == (family == "mixtral")
    llmsparse.unpack("out", "dense")
    loaded = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
    plain = AutoModelForCausalLM.from_pretrained("dense", dtype="auto")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids[:1]).logits, plain(ids[:1]).logits, rtol=2e-2, atol=2e-2)
    for name, array in packed_reader.read(Path("out")).items():
        want = plain.get_parameter(name).detach() if name in dict(plain.named_parameters()) else None
        if want is not None and name in weights:
            assert np.array_equal(array, want.contiguous().view(torch.int16).numpy().view(np.uint16)), name


def test_a_sparse_model_keeps_its_zeros(model: str) -> None:
    llmsparse.prune(model, sparsity=0.7, method="wanda", match_steps=0, output="pruned", **SMALL)
    before = load_file("pruned/model.safetensors")
    for name, keys in {"bits": {"bits": 2.6}, "int8": {"values": "int8"}, "int4": {"values": "int4"}}.items():
        report = llmsparse.quantize("pruned", output=name, **keys, **SMALL)
        llmsparse.unpack(name, f"{name}-dense")
        after = load_file(f"{name}-dense/model.safetensors")
        for row in report.rows:
            key = f"{row.name}.weight"
            assert not after[key][before[key] == 0].any() and row.notes["zeros_before"] == pytest.approx(0.7, abs=0.02)
        close = torch.nn.functional.cosine_similarity(
            after[key].flatten().float(), before[key].flatten().float(), dim=0
        )
        assert close > (0.999 if name == "int8" else 0.9)
    plan = make_plan(QuantizeRecipe(model="pruned", values="int8", output="new", **SMALL))
    assert plan.bits == pytest.approx(stored_bits("int8"), rel=0.03)


def test_a_head_of_its_own_may_be_quantized_too(tiny_llama: Callable[..., Path]) -> None:
    untied = str(tiny_llama(Path("untied"), hidden=64, ffn=96, tie=False, dtype=torch.bfloat16))
    report = llmsparse.quantize(untied, bits=3, head_bits=8, output="out", **SMALL)
    weights = weights_of("out")
    assert "lm_head.weight" in weights and weights["lm_head.weight"].numbers().abs().max() == 127
    assert report.bits == pytest.approx(3, abs=0.01), "the head does not count"
    told = " ".join(f"{name} {text}" for name, text in report.findings())
    assert "bits a weight 3.0" in told and f"lm_head {report.rows[-1].bits:.3f} bits" in told
    dry = make_plan(QuantizeRecipe(model=untied, bits=3, head_bits=8, output="new", **SMALL))
    written = sum(tensor.nbytes for tensor in load_file("out/model.safetensors").values())
    assert dry.bytes_to_write == pytest.approx(written, rel=0.01)


def test_a_head_goes_by_the_method_of_the_others(tiny_llama: Callable[..., Path]) -> None:
    untied = str(tiny_llama(Path("untied"), hidden=64, ffn=96, tie=False, dtype=torch.bfloat16))
    llmsparse.quantize(untied, bits=3, head_bits=4, method="nearest", output="out", **SMALL)
    head, dense = weights_of("out")["lm_head.weight"], load_file("untied/model.safetensors")["lm_head.weight"].float()
    nearest = (dense / head.steps.float()).round().clamp(-7, 7)  # one step a row
    assert (nearest == head.numbers().float()).float().mean() > 0.999


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_step_may_stand_for_a_whole_matrix(model: str) -> None:
    report = llmsparse.quantize(model, bits=2.5, group="matrix", match_steps=4, output="out", **SMALL)
    for name, weight in weights_of("out").items():
        assert weight.tensors()["_steps"].shape == (1, 1) and weight.step_rows == weight.shape[0], name
    assert report.bits == pytest.approx(2.5, abs=0.01) and stored_bits("out") == pytest.approx(2.5, rel=0.02)
    assert all(row.group == row.shape[0] * row.shape[1] for row in report.rows)
    llmsparse.unpack("out", "dense")
    dense, by_page = load_file("dense/model.safetensors"), packed_reader.read(Path("out"))
    loaded = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
    for name, held in packed_weights(loaded):
        assert torch.equal(held.dense(), dense[name])
        assert np.array_equal(by_page[name], dense[name].view(torch.int16).numpy().view(np.uint16))
    loaded.save_pretrained("saved")
    again = load_file("saved/model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in load_file("out/model.safetensors").items())
    assert PackedCheckpoint(Path("saved")).layers == PackedCheckpoint(Path("out")).layers
    by_kernel = load_model(Path("out"), backend="cpu-nested", device=torch.device("cpu"))
    by_kernel.save_pretrained("kernel")
    again = load_file("kernel/model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in load_file("out/model.safetensors").items())


class StopAt(Silent):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def block(self, name: str) -> None:
        if name == self.name:
            raise KeyboardInterrupt


def files(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    report = json.loads(found.pop("llmsparse_report.json"))
    del report["timings"]
    return found | {"report": json.dumps(report).encode()}


@pytest.mark.parametrize("where", ["model.layers.1", "model.layers.1.mlp.up_proj.weight"])
def test_a_broken_off_run_goes_on_to_the_same_bytes(model: str, here: Path, where: str) -> None:
    keys: dict[str, Any] = {"bits": 2.5, "output": "out", **SMALL}
    llmsparse.quantize(model, **keys)
    whole = files(here / "out")
    (here / "out").rename("whole")
    with pytest.raises(KeyboardInterrupt):
        llmsparse.quantize(model, **keys, progress=StopAt(where))
    assert not (here / "out").exists()
    llmsparse.quantize(model, **keys, resume=True)
    assert files(here / "out") == whole


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(model: str, here: Path) -> None:
    options = [f"{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    command = [sys.executable, "-m", "llmsparse", "quantize", model, "--bits", "2.5", "-o", "out"]
    command += [part for option in options for part in ("--" + option.split("=")[0], option.split("=")[1])]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    journal = here / "out.partial" / ".llmsparse" / "journal.jsonl"
    while run.poll() is None and not (journal.exists() and b"layers.0" in journal.read_bytes()):
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    if not (here / "out").exists():
        subprocess.run([*command, "--resume"], check=True, capture_output=True)
    killed = files((here / "out").rename("killed"))
    llmsparse.quantize(model, bits=2.5, output="out", **SMALL)
    assert files(here / "out") == killed


BAD: dict[str, tuple[list[str], str]] = {
    "nothing asked for": ([], "give --bits 2.5"),
    "both": (["--bits", "3", "--values", "int8"], "both say how many bits"),
    "too few bits": (["--bits", "0.5"], "takes at least 0.65 bits a weight"),
    "no bits": (["--bits", "0"], "wanted a number of bits"),
    "damping beyond reason": (["--bits", "3", "damp=1e300"], "damp=1e300: got 1e+300, wanted at most 1"),
    "too many bits": (["--bits", "9"], "at most 8"),
    "a dense matrix": (["--values", "int8"], "is a dense matrix (0.0% zeros)"),
    "a group that does not divide": (["--bits", "3", "--group", "48"], "has 64 inputs, which 48 does not divide"),
    "a group that is none": (["--bits", "3", "--group", "column"], "wanted row"),
    "values and a step for a matrix": (["--values", "int8", "--group", "matrix"], "matrix beside values int8"),
    "a head of two bits": (["--bits", "3", "--head-bits", "2"], "wanted at least 4"),
    "a glob of nothing": (["--bits", "3", "--only", "mlpp"], "matches none of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, model: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, wanted = BAD[case]
    assert main(["quantize", model, "-o", "out", "--calibration", "builtin", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and wanted in err, err
    assert list(here.iterdir()) == []


def test_a_quantized_source_is_refused(model: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llmsparse.quantize(model, bits=3, output="out", **SMALL)
    capsys.readouterr()
    assert main(["quantize", "out", "--bits", "2", "-o", "again", "--calibration", "builtin"]) == 2
    assert "packed by llmsparse; restore it first" in capsys.readouterr().err
    assert main(["inspect", "out"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "nested: 14 weights, 3.0" in shown and "their entropy is" in shown and "steps 0.2" in shown


@pytest.mark.parametrize("name", list(recipe_file.shipped("quantize")))
def test_shipped_recipes_run(name: str, model: str, here: Path) -> None:
    source = model
    if name.startswith("sparse"):
        save_sparse("llama", here / "sparse", hidden_size=64)
        source = str(here / "sparse")
        from safetensors.torch import save_file

        save_file({"input_ids": torch.randint(0, 60, (6, 32))}, "ids.safetensors")
    small = SMALL if source == model else {"calibration": "ids.safetensors", "calibration_samples": 4, "device": "cpu"}
    recipe = QuantizeRecipe.load(name, {"model": source, "output": "out", **small})
    report = llmsparse.quantize(recipe)
    assert recipe.bits is None or report.bits == pytest.approx(recipe.bits, abs=0.02)
