"""The plan's estimate of peak memory, held against runs: a process for each method, on a Llama whose blocks outweigh the
libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import llmsparse
from llmsparse.pruners import ALPS, PRUNERS, DSnoT, Magnitude, Pruned, Pruner, SparseGPT, Wanda, workspace_of
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.quantization.recipe import QuantizeRecipe
from llmsparse.runs.recipe import RunRecipe
from llmsparse.sparsity.patterns import Pattern, Scope
from llmsparse.sparsity.stats import Gram, Statistic

RUN = """
import json, sys, torch, llmsparse
from llmsparse.storage.heap import release_freed
torch.set_num_threads(1)
model, tokens, out, runs = sys.argv[1:]
for number, keys in enumerate(json.loads(runs)):
    keys |= dict(model=model, calibration=tokens, calibration_samples=4, device="cpu", output=f"{out}-{number}")
    estimate = llmsparse.plan(**keys).memory_bytes()
    peak = llmsparse.prune(**keys).peak_memory_bytes
    release_freed()
    print(json.dumps([estimate, peak]))
"""
QUICK = {  # what takes time takes no memory
    "alps": {"name": "alps", "max_iterations": 3, "solve_iterations": 2},
    "swaps": {"name": "swaps", "swaps": 2, "solve_iterations": 2},
}
HALF = {"sparsity": 0.5}
RUNS = {
    name: [HALF | {"method": QUICK.get(name, name), "match_steps": steps} for steps in (0, 1)] for name in PRUNERS
}  # fmt: skip
RUNS["magnitude"].append({"method": "magnitude", "pattern": "2:4", "match_steps": 0})
RUNS["wanda"].append(HALF | {"method": "wanda", "match_steps": 1, "dtype": "bfloat16"})


@pytest.fixture(scope="module")
def wide_llama(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("wide") / "model", hidden=1024, ffn=4096)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": torch.randint(0, 384, (6, 128), generator=torch.Generator().manual_seed(0))}, file)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("method", PRUNERS)
def test_a_run_takes_about_what_its_plan_says(method: str, wide_llama: Path, tokens: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(wide_llama), str(tokens), str(tmp_path / "out"), json.dumps(RUNS[method])],
        check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == len(RUNS[method])
    ratios = [round(estimate / peak, 2) for estimate, peak in found]
    print(method, list(zip(RUNS[method], found, ratios, strict=True)))
    assert all(0.8 <= ratio <= 1.5 for ratio in ratios), list(zip(RUNS[method], found, ratios, strict=True))


@dataclass(frozen=True)
class Silent:
    """A method of a user's own that does not say what it works with."""

    needs: type[Statistic] | None = None
    scope: Scope = "row"

    def __call__(
        self, weight: torch.Tensor, stat: Statistic | None, pattern: Pattern, generator: torch.Generator
    ) -> Pruned:
        return Magnitude()(weight, stat, pattern, generator)


def test_a_method_that_does_not_say_is_taken_for_six_copies_and_with_a_gram_for_three_factors() -> None:
    silent, solving = Silent(), Silent(needs=Gram)
    assert workspace_of(silent, 100, 10) == 6 * 4 * 100 * 10  # pyright: ignore[reportArgumentType]
    assert workspace_of(solving, 100, 10) == 6 * 4 * 100 * 10 + 3 * 4 * 10 * 10  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("method", [method() for method in PRUNERS.values()], ids=list(PRUNERS))
def test_no_method_works_with_less_than_what_comes_out(method: Pruner) -> None:
    assert workspace_of(method, 100, 10) >= (4 + 1) * 100 * 10


def test_a_factorization_outweighs_the_weight_where_inputs_are_many() -> None:
    assert SparseGPT().workspace(1, 1000) == 3 * 4 * 1000**2
    assert SparseGPT().workspace(10_000, 1000) == 4 * 1000**2 + 24 * 10_000 * 1000


def test_alps_keeps_inverses_only_where_they_are_shared() -> None:
    assert ALPS().workspace(1, 4096) > 12 * 4 * 4096**2
    assert ALPS().workspace(1, 4097) < 6 * 4 * 4097**2
    assert ALPS(max_iterations=3).workspace(1, 4096) < 6 * 4 * 4096**2


def test_swapping_composes_with_the_method_it_starts_from() -> None:
    assert DSnoT(SparseGPT()).workspace(10, 1000) == SparseGPT().workspace(10, 1000)
    assert DSnoT(Wanda()).workspace(10, 1000) == DSnoT(Magnitude()).workspace(10, 1000) > Wanda().workspace(10, 1000)


def test_a_plan_of_several_processes_holds_less_in_each(wide_llama: Path, tokens: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "model": str(wide_llama),
        "calibration": str(tokens),
        "method": "sparsegpt",
        "device": "cpu",
    }
    plan = llmsparse.plan(**keys, sparsity=0.5, match_steps=0, output=str(tmp_path / "out"), calibration_samples=6)
    one, two, four = (plan.of_processes(size).memory_bytes() for size in (1, 2, 4))
    assert one == plan.memory_bytes() >= two >= four
    assert one > four, "fewer windows, and fewer partial sums of a statistic"


@pytest.mark.parametrize(
    ("recipe", "keys"), [(PruneRecipe, {"method": "sparsegpt", "sparsity": 0.5}), (QuantizeRecipe, {"bits": 3})]
)
def test_what_statistics_may_take_is_decided_once_a_run(
    recipe: type[RunRecipe], keys: dict[str, Any], tiny_llama: Callable[..., Path], tokens: Path, tmp_path: Path
) -> None:
    """Asked anew for every input it would shrink by what the run itself holds, and more passes would be made."""
    keys = keys | {"calibration": str(tokens), "calibration_samples": 4, "device": "cpu"}
    plan: Any = llmsparse.plan(recipe(model=str(tiny_llama(tmp_path / "model")), output=str(tmp_path / "out"), **keys))
    budget = plan.options.statistics_budget
    held = torch.ones(2**26)
    assert plan.options.statistics_budget == budget > 0, held.shape
