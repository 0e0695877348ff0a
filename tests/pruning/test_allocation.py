"""Allocations in a run: the total that was asked for, resumed to the same bytes, said beforehand and in the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_random, tiny_config
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import RecipeError
from llmsparse.pruning.allocation.owl import OWL
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.runs.progress import Silent

KEYS: dict[str, Any] = {
    "method": "sparsegpt", "sparsity": 0.7, "match_steps": 0, "calibration": "notes.txt", "calibration_samples": 8,
    "seq_len": 32, "device": "cpu",
}  # fmt: skip
QUICK = {"name": "search", "generations": 2, "candidates": 4}


@pytest.fixture(autouse=True)
def here(tiny_llama: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "model", layers=3)
    (tmp_path / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    return tmp_path


def prune(output: str = "out", *, progress: Silent | None = None, resume: bool = False, **keys: Any) -> Any:
    recipe = PruneRecipe(**{"model": "model", "output": output, **KEYS, **keys})
    return llmsparse.prune(recipe, progress=progress, resume=resume)


def zeros(report: Any) -> int:
    weights = load_file(Path(report.output) / "model.safetensors")
    return sum(int((weights[f"{row.name}.weight"] == 0).sum()) for row in report.rows)


def as_uniform(report: Any) -> int:
    """The zeros that there would be if all were alike."""
    return sum(round(0.7 * row.numel) for row in report.rows)


@pytest.mark.parametrize("level", ["block", "projection", "weight"])
@pytest.mark.parametrize("name", ["owl", "dlp", "lsa", "alphapruning", "er", "erk", QUICK])
def test_every_allocation_makes_the_exact_total_and_empties_no_weight(name: Any, level: str) -> None:
    report = prune(allocation=name, allocation_level=level)
    assert zeros(report) == as_uniform(report)
    assert all(0 <= row.sparsity <= 0.925 + 1e-3 for row in report.rows)
    assert len(report.allocated.units) == {"block": 3, "projection": 21, "weight": 21}[level]
    of_one = [row.sparsity_asked for row in report.rows if ".layers.1." in row.name]
    assert level != "block" or max(of_one) - min(of_one) < 0.005  # counts are whole numbers


@pytest.mark.parametrize("method", ["magnitude", "wanda", "dsnot", "alps", "random"])
def test_it_goes_with_every_method_and_with_matching(method: str) -> None:
    report = prune(method=method, allocation="dlp", match_steps=3)
    uniform = sum(round(0.7 * row.shape[1]) * row.shape[0] for row in report.rows)
    if method in ("wanda", "dsnot", "alps"):  # whole rows: as many zeros as if all were alike, to half a row
        assert abs(zeros(report) - uniform) <= max(row.shape[0] for row in report.rows)
    else:
        assert zeros(report) == as_uniform(report)
    assert len({row.sparsity_asked for row in report.rows}) > 1


def test_uniform_is_what_a_run_without_allocation_is() -> None:
    prune("one")
    prune("two", allocation="uniform")
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    assert "allocation" not in json.loads(Path("one/llmsparse_report.json").read_text())


class StopAt(Silent):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.left, self.seen = blocks, 0

    def block(self, name: str) -> None:
        self.seen += 1
        if self.seen > self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "passes"), [("owl", 1), (QUICK, 3)])
@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_it_is_resumed_to_the_same_bytes_without_another_look(name: Any, passes: int, blocks: int) -> None:
    prune("whole", allocation=name)
    stopped = blocks if blocks < 3 else 3 * (passes - 1) + blocks  # in the first pass; between; while pruning
    with pytest.raises(KeyboardInterrupt):
        prune("parted", allocation=name, progress=StopAt(stopped))
    watched = StopAt(99)
    prune("parted", allocation=name, progress=watched, resume=True)
    assert Path("whole/model.safetensors").read_bytes() == Path("parted/model.safetensors").read_bytes()
    assert watched.seen == (3 if stopped >= 3 * passes else 3 * (passes + 1)), "what was found is noted"
    reports = [json.loads(Path(f"{one}/llmsparse_report.json").read_text()) for one in ("whole", "parted")]
    assert reports[0]["allocation"] == reports[1]["allocation"]


def test_a_search_is_no_worse_than_uniform_by_its_own_loss() -> None:
    report = prune(allocation=QUICK)
    assert report.allocated.loss["found"] <= report.allocated.loss["uniform"]
    assert "by its scores" in dict(report.findings())["allocation"]


def test_an_n_of_m_model_is_a_mix_of_levels_of_the_same_total() -> None:
    report = prune(sparsity=None, pattern="2:4", allocation={"name": "dlp", "spread": 0.3}, allocation_level="weight")
    patterns = {row.pattern for row in report.rows}
    assert patterns <= {"1:4", "2:4", "3:4", "unstructured"} and len(patterns) > 1
    numel = sum(row.numel for row in report.rows)
    assert abs(zeros(report) - numel / 2) <= max(row.numel for row in report.rows) / 8
    weights = load_file("out/model.safetensors")
    for row in report.rows:
        kept = (weights[f"{row.name}.weight"].view(-1, 4) != 0).sum(dim=1)
        assert kept.max() <= {"1:4": 1, "2:4": 2, "3:4": 3, "unstructured": 4}[row.pattern]


def test_a_sparsity_beside_n_of_m_leaves_the_rest_dense() -> None:
    report = prune(sparsity=0.3, pattern="2:4", allocation="owl", allocation_level="weight")
    dense = [row for row in report.rows if row.sparsity_asked == 0]
    assert dense and all(row.sparsity == 0 for row in dense)
    assert {row.pattern for row in report.rows if row not in dense} == {"2:4"}
    assert abs(report.sparsity - 0.3) < 0.05
    with pytest.raises(RecipeError, match=r"wanted more than 0 and less than 0\.5"):
        PruneRecipe(model="model", sparsity=0.6, pattern="2:4", allocation="owl")
    with pytest.raises(RecipeError, match=r"means sparsity 0\.5"):
        PruneRecipe(model="model", sparsity=0.3, pattern="2:4")


def test_what_a_rule_says_stays_and_the_others_make_up_the_total() -> None:
    rule = {"match": "*.down_proj", "sparsity": 0.25}
    report = prune(allocation="dlp", allocation_level="weight", rules=[rule])
    ruled = [row for row in report.rows if row.name.endswith("down_proj")]
    assert all(row.sparsity_asked == 0.25 for row in ruled)
    others = [row for row in report.rows if row not in ruled]
    total = sum(round(row.sparsity * row.numel) for row in others)
    assert total == sum(round(0.7 * row.numel) for row in others)


def test_experts_of_a_projection_share_a_sparsity(here: Path) -> None:
    save_random(tiny_config("mixtral"), here / "moe")
    ids = {"calibration": "tokens.safetensors", "seq_len": None}
    import torch
    from safetensors.torch import save_file

    save_file(
        {"input_ids": torch.randint(3, 97, (24, 32), generator=torch.Generator().manual_seed(0))}, "tokens.safetensors"
    )
    report = prune(model="moe", allocation="owl", allocation_level="projection", **ids)
    first = {
        row.sparsity_asked for row in report.rows if ".0.block_sparse_moe.experts" in row.name and "w2" in row.name
    }
    assert max(first) - min(first) < 2e-3, "to a zero"
    assert zeros(report) == as_uniform(report)


def test_a_plan_says_what_it_takes_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--sparsity", "0.7", "--calibration", "notes.txt", "--seq-len", "32", "calibration_samples=8"]
    assert main(["plan", "model", *flags, "--allocation", "owl"]) == 0
    assert "OWL over 3 blocks, 1 more pass over the model" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", "model", *flags, "--allocation", "search", "--allocation-level", "weight"]) == 0
    assert "Search over 21 weights, 7 more passes" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", "model", *flags, "--allocation", "er"]) == 0
    assert "more pass" not in capsys.readouterr().out
    assert {path.name for path in here.iterdir()} == {"model", "notes.txt"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--allocation", "owls"], "unknown allocation 'owls'; did you mean 'owl'?"),
        (["--allocation-level", "layer"], "wanted block, projection or weight"),
        (
            ["--allocation", "owl", "--allocation-bounds", "0.1,0.6"],
            "a sparsity of 0.7 overall cannot be reached within",
        ),
        (["--allocation", "owl", "--allocation-bounds", "0.8,0.6"], "wanted the least sparsity first"),
        (["--allocation", "owl", "--allocation-bounds", "0.8"], "wanted the least and the largest sparsity"),
        (["allocation.spread=2"], "allocation"),
    ],
)
def test_an_allocation_that_cannot_be_is_one_line(
    here: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--sparsity", "0.7", "--calibration", "notes.txt", "--seq-len", "32", "calibration_samples=8"]
    assert main(["prune", "model", "-o", "out", *given, *flags]) == 2
    printed = capsys.readouterr().err.strip()
    assert said in printed and "\n" not in printed and not list(here.glob("out*"))


def test_bounds_are_kept() -> None:
    report = prune(allocation={"name": "dlp", "spread": 0.5}, allocation_bounds="0.65,0.75")
    assert all(0.649 <= row.sparsity_asked <= 0.751 for row in report.rows)
    assert zeros(report) == as_uniform(report)
    written = PruneRecipe.load("out/llmsparse_recipe.yaml")
    assert written.allocation == {"name": "dlp", "spread": 0.5} and written.allocation_bounds == (0.65, 0.75)


def test_every_block_is_looked_at_behind_the_dense_ones_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[Tensor] = []
    look = OWL.look

    def noting(self: OWL, weight: Tensor, stat: Any) -> Any:
        norms.append(stat.norm)
        return look(self, weight, stat)

    monkeypatch.setattr(OWL, "look", noting)
    plan = llmsparse.plan(PruneRecipe(model="model", output="out", **KEYS | {"allocation": "owl"}))
    prune(allocation="owl")
    model: Any = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    entered: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(lambda _, x: entered.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        model(plan.windows.ids)
    seven = norms[::7]  # q of each block; each of its seven weights is looked at once
    assert len(norms) == 21 and len(entered) == 3
    for norm, x in zip(seven, entered, strict=True):  # x: (tokens, width)
        torch.testing.assert_close(norm, x.norm(dim=0), rtol=1e-4, atol=1e-4)
