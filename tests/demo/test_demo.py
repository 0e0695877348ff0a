"""The demo, whole: what `make demo` shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmsparse.demo import run as demo
from llmsparse.demo import size_and_speed
from llmsparse.models.origin import BUILTIN_FOLDER
from llmsparse.pruners import PRUNERS
from llmsparse.pruning.pipeline import prune
from llmsparse.pruning.recipe import PruneRecipe


def test_the_demo_runs_every_method_but_the_random_baseline_and_what_refines_another() -> None:
    assert {method for _, method, _ in demo.RUNS} == set(PRUNERS) - {"random", "swaps"}
    assert any(steps for _, _, steps in demo.RUNS), "and block matching"


def test_the_embedded_model_is_small_and_fits_every_pattern() -> None:
    from llmsparse.storage.checkpoint import CheckpointReader

    reader = CheckpointReader(BUILTIN_FOLDER)
    assert sum(path.stat().st_size for path in BUILTIN_FOLDER.iterdir()) <= 17e6
    matrices = [reader.spec(key) for key in reader.keys() if ".layers." in key and "norm" not in key]
    assert len(matrices) == 56
    assert all(size % 128 == 0 for spec in matrices for size in spec.shape)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_packing_the_demos_model_shows_its_size_and_its_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size_and_speed, "TOKENS", 4)
    monkeypatch.setattr(size_and_speed, "TURNS", 1)
    monkeypatch.setattr(size_and_speed, "SECONDS", 0.01)
    monkeypatch.setattr(size_and_speed, "MATRIX", "256x512")
    recipe = PruneRecipe(
        model="builtin",
        output=str(tmp_path / "pruned"),
        method="magnitude",
        sparsity=0.5,
        calibration="builtin",
        calibration_samples=2,
        match_steps=0,
        seq_len=64,
        device="cpu",
    )
    prune(recipe)

    shown = size_and_speed.size_and_speed("magnitude", tmp_path / "pruned", tmp_path / "packed")

    parameters, rows = 6_291_456, 8 * (2 * 256 + 2 * 128 + 2 * 768 + 256)  # of 56 matrices: q, o; k, v; gate, up; down
    assert shown.weight_dense_bytes == 2 * parameters
    assert shown.weight_bytes == parameters + parameters // 8 + 4 * rows + 4 * 56
    assert shown.checkpoint_dense_bytes - shown.checkpoint_bytes == shown.weight_dense_bytes - shown.weight_bytes
    assert shown.text.startswith("def ") and len(shown.text) > 4
    assert shown.tokens_per_second > 0 and shown.dense_tokens_per_second > 0
    assert [(row.pattern, row.sparsity) for row in shown.matrix] == list(size_and_speed.PATTERNS)
    for row in shown.matrix:
        assert not row.gain or row.packed_seconds < row.dense_seconds
