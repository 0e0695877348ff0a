"""Pruning a sparse model further: its zeros stay, if that is asked, and are counted if they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmsparse
from llmsparse.pruners import PRUNERS, DSnoT, Pruner, SparseGPT
from llmsparse.sparsity.patterns import KeepingZeros, NofM, Pattern, Unstructured
from llmsparse.sparsity.stats import Gram

Build = Callable[..., Path]
RUN = {"calibration_samples": 8, "seq_len": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def sparse(tiny_llama: Build, tmp_path_factory: pytest.TempPathFactory, text: str) -> tuple[Path, Path]:
    """A model pruned to 2:4, and text to calibrate on."""
    folder = tmp_path_factory.mktemp("sparse")
    (folder / "notes.txt").write_text(text[:40_000], encoding="utf-8")
    prune(tiny_llama(folder / "model"), folder / "2of4", folder / "notes.txt", method="sparsegpt", pattern="2:4")
    return folder / "2of4", folder / "notes.txt"


def prune(source: Path, output: Path, notes: Path, **keys: Any) -> llmsparse.PruneReport:
    return llmsparse.prune(
        model=str(source), output=str(output), calibration=str(notes), **{"match_steps": 0, **RUN, **keys}
    )


def returned(before: Path, after: Path) -> int:
    a, b = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    return sum(int(((a[key] == 0) & (b[key] != 0)).sum()) for key in a if "_proj" in key)


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("how", [{"sparsity": 0.7}, {"pattern": "1:4"}, {"sparsity": 0.7, "match_steps": 8}])
def test_zeros_stay_under_every_method_and_pattern(
    method: str, how: dict[str, Any], sparse: tuple[Path, Path], tmp_path: Path
) -> None:
    source, notes = sparse
    report = prune(source, tmp_path / "out", notes, method=method, keep_zeros=True, **how)
    assert returned(source, tmp_path / "out") == 0
    assert not any("sparse already" in warning for warning in report.warnings)
    asked = 0.75 if "pattern" in how else 0.7
    assert report.sparsity == pytest.approx(asked, abs=0.02)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    groups = tensors["model.layers.0.mlp.up_proj.weight"].view(-1, 4)
    assert int((groups != 0).sum(1).max()) <= 2, "still 2:4"


def test_without_it_the_report_counts_the_zeros_that_came_back(sparse: tuple[Path, Path], tmp_path: Path) -> None:
    notes, source = sparse[1], tmp_path / "70"
    prune(sparse[0].parent / "model", source, notes, method="sparsegpt", sparsity=0.6)
    report = prune(source, tmp_path / "out", notes, method="sparsegpt", pattern="2:4")
    count = returned(source, tmp_path / "out")
    assert count > 0
    (warning,) = [warning for warning in report.warnings if "sparse already" in warning]
    assert f"{count:,} of the" in warning and "--keep-zeros" in warning


def test_a_method_that_updates_nothing_brings_nothing_back(sparse: tuple[Path, Path], tmp_path: Path) -> None:
    source, notes = sparse
    report = prune(source, tmp_path / "out", notes, method="wanda", sparsity=0.3)
    assert returned(source, tmp_path / "out") == 0
    assert not any("sparse already" in warning for warning in report.warnings)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "matrix"), Unstructured(0.5, "row"), NofM(2, 4)])
def test_zeros_count_towards_what_is_asked(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(6, 16, generator=generator)
    zeros = torch.zeros(6, 16, dtype=torch.bool)
    zeros[:, ::4] = True
    keep = KeepingZeros(pattern, zeros).keep(score, slice(0, 16), 16)
    assert not (keep & zeros).any()
    assert int(keep.sum()) == 6 * 8
    halves = [KeepingZeros(pattern, zeros).keep(score[:, a : a + 8], slice(a, a + 8), 16) for a in (0, 8)]
    assert int(torch.cat(halves, 1).sum()) == 6 * 8 and not (torch.cat(halves, 1) & zeros).any()


def test_what_is_sparser_than_asked_stays_so() -> None:
    zeros = torch.ones(2, 8, dtype=torch.bool)
    zeros[:, 0] = False
    keep = KeepingZeros(NofM(2, 4), zeros).keep(torch.rand(2, 8), slice(0, 8), 8)
    assert torch.equal(keep, ~zeros)


@pytest.mark.parametrize("pruner", [DSnoT(), DSnoT(initial=SparseGPT())])
def test_no_swap_regrows_a_zero(pruner: Pruner) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, 32, generator=generator), torch.randn(200, 32, generator=generator) + 0.5
    weight[torch.rand(12, 32, generator=generator) < 0.4] = 0.0
    gram = Gram(32, torch.device("cpu"))
    gram.update(x)
    made = pruner(weight, gram, KeepingZeros(Unstructured(0.6, "row"), weight == 0), generator)
    assert not (made.keep & (weight == 0)).any()
    assert int(made.keep.sum()) == 12 * 32 - 12 * round(0.6 * 32)
