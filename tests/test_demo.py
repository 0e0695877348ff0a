"""The demo, whole: what `make demo` shows."""

from __future__ import annotations

from llmsparse import demo
from llmsparse.pruners import PRUNERS


def test_the_demo_runs_every_method_but_the_random_baseline() -> None:
    assert {method for _, method, _ in demo.RUNS} == set(PRUNERS) - {"random"}
    assert any(steps for _, _, steps in demo.RUNS), "and block matching"


def test_the_embedded_model_is_small_and_fits_every_pattern() -> None:
    from llmsparse.checkpoint import CheckpointReader

    reader = CheckpointReader(demo.MODEL)
    assert sum(path.stat().st_size for path in demo.MODEL.iterdir()) <= 17e6
    matrices = [reader.spec(key) for key in reader.keys() if ".layers." in key and "norm" not in key]
    assert len(matrices) == 56
    assert all(size % 128 == 0 for spec in matrices for size in spec.shape)
