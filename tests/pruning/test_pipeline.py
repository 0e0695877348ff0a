"""The pipeline on tiny checkpoints: what comes out, byte by byte."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import CheckpointError, LlmsparseError, MachineError, PatternError, RecipeError
from llmsparse.pruners import PRUNERS
from llmsparse.runs.progress import Silent
from llmsparse.storage.checkpoint import CheckpointReader

Build = Callable[..., Path]
RUN = {"calibration_samples": 8, "seq_len": 32, "match_steps": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tiny_llama: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", shards=3, layers=3)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    file.write_text(text[:40_000], encoding="utf-8")
    return file


def tensors(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return reader.read(reader.keys())


def files(folder: Path) -> dict[str, bytes]:
    """What the promise of identical bytes covers: every file, the report without its timings."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    report = json.loads(found.pop("llmsparse_report.json"))
    report.pop("timings")
    return {**found, "report": json.dumps(report).encode()}


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_every_method_writes_a_checkpoint_of_exactly_the_sparsity_asked(
    method: str, pattern: str, model: Path, notes: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"pattern": pattern} if ":" in pattern else {"sparsity": 0.5}
    report = llmsparse.prune(
        model=str(model), output=str(tmp_path / "out"), method=method, calibration=str(notes), **asked, **RUN
    )
    before, after = tensors(model), tensors(tmp_path / "out")
    assert list(before) == list(after)
    pruned = {row.name + ".weight" for row in report.rows}
    assert len(pruned) == 3 * 7
    for key in before:
        assert before[key].dtype == after[key].dtype
        if key in pruned:
            assert (after[key] == 0).sum() == after[key].numel() // 2, key
            assert not torch.signbit(after[key][after[key] == 0]).any()
        else:
            assert torch.equal(before[key], after[key]), key
    assert report.sparsity == 0.5


def test_plain_transformers_loads_the_result_and_gets_the_reported_perplexity(
    model: Path, notes: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    llmsparse.prune(model=str(model), output=str(out), method="wanda", sparsity=0.5, calibration=str(notes), **RUN)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor(AutoTokenizer.from_pretrained(out)(notes.read_text())["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        losses = [loaded(row[None], labels=row[None]).loss for row in windows]
    expected = torch.stack(losses).mean().exp().item()
    measured = llmsparse.perplexity(str(out), str(notes), seq_len=32, device="cpu")
    assert measured.perplexity == pytest.approx(expected, rel=1e-4)
    assert measured.tokens == windows.numel() - len(windows)
    assert measured.protocol["seq_len"] == measured.protocol["stride"] == 32


def test_streamed_pruning_equals_pruning_in_memory_bit_for_bit(model: Path, notes: Path, tmp_path: Path) -> None:
    """The same block-by-block loop, written with plain transformers and hooks on the whole model in memory; statistics
    are sums of eight, added up in halves."""
    from transformers import AutoModelForCausalLM

    from llmsparse.pruners import SparseGPT
    from llmsparse.runs.plan import plan
    from llmsparse.sparsity.patterns import Unstructured
    from llmsparse.sparsity.stats import Gram

    keys = {"model": str(model), "method": "sparsegpt", "sparsity": 0.6, "calibration": str(notes), **RUN}
    llmsparse.prune(output=str(tmp_path / "out"), **keys)
    batches = plan(output=str(tmp_path / "other"), **keys).batches

    whole = AutoModelForCausalLM.from_pretrained(model)
    hidden = [whole.model.embed_tokens(ids) for ids in batches]
    positions = torch.arange(32)[None]
    rotary = whole.model.rotary_emb(hidden[0], positions)
    with torch.no_grad():
        for layer in whole.model.layers:
            linear = {name: part for name, part in layer.named_modules() if isinstance(part, torch.nn.Linear)}
            sums: list[dict[str, Gram]] = []  # of each eighth of the batches
            for leaf in range(8):
                grams = {name: Gram(part.in_features, torch.device("cpu")) for name, part in linear.items()}
                hooks = [
                    part.register_forward_pre_hook(lambda _, args, gram=grams[name]: gram.update(args[0].flatten(0, 1)))
                    for name, part in linear.items()
                ]
                for x in hidden[leaf * len(hidden) // 8 : (leaf + 1) * len(hidden) // 8]:
                    layer(x, position_ids=positions, position_embeddings=rotary)
                for hook in hooks:
                    hook.remove()
                sums.append(grams)
            while len(sums) > 1:  # neighbours, and neighbours of neighbours
                for one, other in zip(sums[::2], sums[1::2], strict=True):
                    for name, gram in one.items():
                        gram.merge(other[name])
                sums = sums[::2]
            grams = sums[0]
            for name, gram in grams.items():
                weight = layer.get_submodule(name).weight
                weight.copy_(SparseGPT()(weight, gram, Unstructured(0.6, "matrix"), torch.Generator()).weight)
            hidden = [layer(x, position_ids=positions, position_embeddings=rotary) for x in hidden]
    written = tensors(tmp_path / "out")
    for key, expected in whole.state_dict().items():
        if key in written:
            assert torch.equal(written[key], expected), key


def test_the_error_in_a_row_is_that_of_the_layer_output(model: Path, notes: Path, tmp_path: Path) -> None:
    keys = {"model": str(model), "method": "magnitude", "sparsity": 0.5, "calibration": str(notes), **RUN}
    report = llmsparse.prune(output=str(tmp_path / "out"), **keys)
    plan = llmsparse.plan(output=str(tmp_path / "other"), **keys)
    before, after = tensors(model), tensors(tmp_path / "out")
    norm = before["model.layers.0.input_layernorm.weight"]
    x = torch.cat([before["model.embed_tokens.weight"][ids] for ids in plan.batches]).flatten(0, 1)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm  # 8 windows: fewer rows than are sampled
    key = "model.layers.0.self_attn.q_proj"
    dense, pruned = linear(x, before[key + ".weight"]), linear(x, after[key + ".weight"])
    expected = ((dense - pruned).square().sum() / dense.square().sum()).item()
    row = next(row for row in report.rows if row.name == key)
    assert row.error == pytest.approx(expected, rel=1e-3)
    assert row.tokens == 8 * 32


def test_matching_lowers_the_loss_and_keeps_every_zero(model: Path, notes: Path, tmp_path: Path) -> None:
    keys = {"model": str(model), "method": "wanda", "sparsity": 0.6, "calibration": str(notes), "refine": "none", **RUN}
    llmsparse.prune(output=str(tmp_path / "plain"), **keys)
    report = llmsparse.prune(output=str(tmp_path / "matched"), **{**keys, "match_steps": 40})
    plain, matched = tensors(tmp_path / "plain"), tensors(tmp_path / "matched")
    zeros = plain["model.layers.0.mlp.up_proj.weight"] == 0
    assert torch.equal(zeros, matched["model.layers.0.mlp.up_proj.weight"] == 0)  # the first block's mask is the same
    assert torch.equal(plain["model.norm.weight"], matched["model.norm.weight"])
    matches = [block.match for block in report.blocks if block.match]
    assert len(matches) == 3 and all(match["validation"] for match in matches)
    assert all(match["after"] <= match["before"] for match in matches)
    assert any(match["after"] < match["before"] for match in matches)
    assert report.sparsity == pytest.approx(0.6, abs=0.01)


def test_a_few_steps_of_fading_leave_nm_to_the_method(model: Path, notes: Path, tmp_path: Path) -> None:
    keys = RUN | {"model": str(model), "calibration": str(notes), "calibration_samples": 96}
    keys |= {"method": "sparsegpt", "pattern": "2:4", "match_steps": 24}
    for refine in ("none", "fading"):
        llmsparse.prune(output=str(tmp_path / refine), refine=refine, permute="off", **keys)
    frozen, faded = tensors(tmp_path / "none"), tensors(tmp_path / "fading")
    assert all(torch.equal(frozen[key], faded[key]) for key in frozen)


def test_bfloat16_is_stored_as_bfloat16_and_the_next_block_sees_it_rounded(
    tiny_llama: Build, notes: Path, tmp_path: Path
) -> None:
    model = tiny_llama(tmp_path / "model", dtype=torch.bfloat16)
    llmsparse.prune(
        model=str(model), output=str(tmp_path / "out"), method="sparsegpt", pattern="2:4", calibration=str(notes), **RUN
    )
    after = tensors(tmp_path / "out")
    weight = after["model.layers.1.mlp.down_proj.weight"]
    assert weight.dtype == torch.bfloat16
    assert ((weight != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((model / "config.json").read_text())


def test_the_head_is_pruned_only_when_included(tiny_llama: Build, notes: Path, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tie=False)
    keys = {"model": str(model), "method": "wanda", "sparsity": 0.5, "calibration": str(notes), **RUN}
    without = llmsparse.prune(output=str(tmp_path / "without"), **keys)
    assert not any("lm_head" in row.name for row in without.rows)
    report = llmsparse.prune(output=str(tmp_path / "with"), include=["lm_head"], **keys)
    assert report.rows[-1].name == "lm_head" and report.rows[-1].tokens == 8 * 32
    assert (tensors(tmp_path / "with")["lm_head.weight"] == 0).float().mean() == 0.5
    assert report.perplexity["before"] == without.perplexity["before"]
    assert report.perplexity["after"] != without.perplexity["after"]
    with pytest.raises(RecipeError, match="matches none"):
        llmsparse.plan(output=str(tmp_path / "norm"), include=["model.norm"], **keys)


def test_rules_and_globs_decide_what_is_pruned_and_how(model: Path, notes: Path, tmp_path: Path) -> None:
    rules = [
        {"match": "*.mlp.*", "sparsity": 0.25},
        {"match": "*.2.mlp.down_proj", "pattern": "1:4", "method": "magnitude"},
    ]
    report = llmsparse.prune(
        model=str(model), output=str(tmp_path / "out"), method="wanda", sparsity=0.5, calibration=str(notes),
        exclude=["*.0.*"], only=["*_proj"], rules=rules, **RUN,
    )  # fmt: skip
    got = {row.name.removeprefix("model.layers."): (row.method, round(row.sparsity, 2)) for row in report.rows}
    assert not any(name.startswith("0.") for name in got)
    assert got["1.self_attn.q_proj"] == ("wanda", 0.5)
    assert got["1.mlp.down_proj"] == ("wanda", 0.25)
    assert got["2.mlp.down_proj"] == ("magnitude", 0.75)


def test_true_sequential_prunes_later_inputs_on_what_earlier_ones_became(
    model: Path, notes: Path, tmp_path: Path
) -> None:
    keys = {"model": str(model), "method": "wanda", "sparsity": 0.5, "calibration": str(notes), **RUN}
    llmsparse.prune(output=str(tmp_path / "at-once"), **keys)
    llmsparse.prune(output=str(tmp_path / "in-turn"), true_sequential=True, **keys)
    at_once, in_turn = tensors(tmp_path / "at-once"), tensors(tmp_path / "in-turn")
    first, later = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(at_once[first], in_turn[first])
    assert not torch.equal(at_once[later], in_turn[later])


def test_little_memory_for_statistics_means_more_passes_and_the_same_bytes(
    model: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"model": str(model), "method": "sparsegpt", "sparsity": 0.5, "calibration": str(notes), **RUN}
    llmsparse.prune(output=str(tmp_path / "one" / "out"), **keys)
    monkeypatch.setattr("llmsparse.pruning.plan.STATISTICS_SHARE", 1e-12)
    llmsparse.prune(output=str(tmp_path / "many" / "out"), **keys)
    one, many = tensors(tmp_path / "one" / "out"), tensors(tmp_path / "many" / "out")
    assert all(torch.equal(one[key], many[key]) for key in one)


def test_side_files_recipe_report_and_card_stand_beside_the_weights(model: Path, notes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    llmsparse.prune(model=str(model), output=str(out), method="wanda", sparsity=0.5, calibration=str(notes), **RUN)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    report = json.loads((out / "llmsparse_report.json").read_text())
    assert report["schema_version"] == 1 and len(report["weights"]) == 21
    assert {"name", "shape", "sparsity_asked", "sparsity", "pattern", "error", "tokens"} <= set(report["weights"][0])
    assert report["timings"]["seconds"] > 0 and report["timings"]["peak_memory_bytes"] > 0
    assert "wanda" in (out / "README.md").read_text()
    again = llmsparse.Recipe.load(out / "llmsparse_recipe.yaml", {"output": str(tmp_path / "again")})
    llmsparse.prune(again)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    assert not (out / ".llmsparse").exists() and not out.with_name("out.partial").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_inf_in_a_weight_is_named_and_nothing_gets_the_final_name(
    value: float, tiny_llama: Build, notes: Path, tmp_path: Path
) -> None:
    model = tiny_llama(tmp_path / "model")
    broken = load_file(model / "model.safetensors")
    broken["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(broken, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlmsparseError, match=r"model\.layers\.1\.mlp\.up_proj") as caught:
        llmsparse.prune(
            model=str(model), output=str(tmp_path / "out"), method="wanda", sparsity=0.5, calibration=str(notes), **RUN
        )
    assert "\n" not in str(caught.value) and isinstance(caught.value, CheckpointError)
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_does_not_divide_is_refused_with_weight_and_width(
    tiny_llama: Build, notes: Path, tmp_path: Path
) -> None:
    model = tiny_llama(tmp_path / "model", ffn=66)
    with pytest.raises(PatternError, match=r"mlp\.down_proj.*66"):
        llmsparse.plan(model=str(model), output=str(tmp_path / "out"), pattern="2:4", calibration=str(notes), **RUN)


class Interrupted(Silent):
    """Ctrl-C as the last of `blocks` blocks begins."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def block(self, name: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def blocks_done(out: Path) -> int:
    journal = out.with_name(out.name + ".partial") / ".llmsparse" / "journal.jsonl"
    return journal.read_bytes().count(b"\n")


def interrupted(model: Path, notes: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The keys of a run that was stopped in its third block, after three entries of the journal."""
    keys = {"model": str(model), "output": str(out), "method": "wanda", "sparsity": 0.5, "calibration": str(notes)}
    keys |= RUN | options
    with pytest.raises(KeyboardInterrupt):
        llmsparse.prune(**keys, progress=Interrupted(3))
    assert blocks_done(out) == 3
    return keys


def test_a_resume_under_changed_conditions_is_refused_by_name(model: Path, notes: Path, tmp_path: Path) -> None:
    keys = interrupted(model, notes, tmp_path / "out")
    with pytest.raises(RecipeError, match="recipe") as caught:
        llmsparse.prune(**keys | {"sparsity": 0.6}, resume=True)
    assert "\n" not in str(caught.value)
    assert blocks_done(tmp_path / "out") == 3, "a refused resume loses nothing"


@pytest.mark.parametrize("damage", ["lost", "truncated"])
@pytest.mark.parametrize("format", ["dense", "packed"])
def test_a_shard_lost_since_the_run_began_is_not_made_anew_as_zeros(
    damage: str, format: str, model: Path, notes: Path, tmp_path: Path
) -> None:
    keys = interrupted(model, notes, tmp_path / "out", format=format, sparsity=0.7)
    shard = next((tmp_path / "out.partial").rglob("model.safetensors"))
    shard.unlink() if damage == "lost" else os.truncate(shard, 5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: lost or damaged .* --overwrite") as caught:
        llmsparse.prune(**keys, resume=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    llmsparse.prune(**keys, overwrite=True)
    assert (tmp_path / "out").exists()


def flip(folder: Path, key: str) -> None:
    """One bit of a tensor, as a failing disk would have it."""
    spec = CheckpointReader(folder).spec(key)
    with spec.file.open("r+b") as stream:
        stream.seek(spec.begin)
        byte = stream.read(1)[0]
        stream.seek(spec.begin)
        stream.write(bytes([byte ^ 1]))


def test_a_bit_that_flips_in_a_finished_block_is_found_on_resume(model: Path, notes: Path, tmp_path: Path) -> None:
    keys = interrupted(model, notes, tmp_path / "out")
    flip(tmp_path / "out.partial", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(MachineError, match=r"layers\.1\.mlp\.up_proj\.weight does not read back") as caught:
        llmsparse.prune(**keys, resume=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_bit_that_flips_while_the_run_goes_on_is_found_at_its_end(model: Path, notes: Path, tmp_path: Path) -> None:
    class Failing(Silent):
        def block(self, name: str) -> None:
            if name == "model.layers.2":
                flip(tmp_path / "out.partial", "model.layers.0.mlp.up_proj.weight")

    keys = {"model": str(model), "output": str(tmp_path / "out"), "method": "wanda", "sparsity": 0.5} | RUN
    with pytest.raises(MachineError, match=r"layers\.0\.mlp\.up_proj\.weight does not read back"):
        llmsparse.prune(**keys, calibration=str(notes), progress=Failing())
    assert not (tmp_path / "out").exists()


NEW_METHOD = """
from dataclasses import dataclass
import torch
from llmsparse.pruners.protocol import Pruned
from llmsparse.sparsity.stats import InputNorm

@dataclass(frozen=True)
class Loudest:
    power: float = 1.0
    scope = "row"
    needs = InputNorm

    def __call__(self, weight, stat, pattern, generator):
        score = weight.abs() * stat.norm**self.power
        keep = pattern.keep(score, slice(0, weight.shape[1]), weight.shape[1])
        return Pruned.of(weight, keep)
"""


def test_a_method_of_ones_own_is_a_file_and_a_line_in_the_table(
    model: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loudest.py").write_text(NEW_METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PRUNERS, "loudest", importlib.import_module("loudest").Loudest)
    flags = ["--sparsity", "0.5", "--match-steps", "0", "--calibration-samples", "8", "--seq-len", "32"]
    common = ["--calibration", str(notes), *flags]
    for method, output in (["loudest", "mine"], ["wanda", "theirs"]):
        assert main(["prune", str(model), "-o", str(tmp_path / output), "--method", method, *common]) == 0
    assert (tmp_path / "mine/model.safetensors").read_bytes() == (tmp_path / "theirs/model.safetensors").read_bytes()
    assert main(["prune", str(model), "-o", str(tmp_path / "x"), "--method", "loudest", "method.power=0", *common]) == 0
    assert (tmp_path / "x/model.safetensors").read_bytes() != (tmp_path / "mine/model.safetensors").read_bytes()
