"""The demo, whole: what `make demo` shows."""

from __future__ import annotations

import pytest

from llmsparse import demo
from llmsparse.pruners import PRUNERS


@pytest.mark.slow
def test_the_demo_prunes_the_embedded_model_by_every_method() -> None:
    shown = demo.run()
    dense, *pruned = shown.rows
    assert {method for _, method, _ in demo.RUNS} == set(PRUNERS) - {"random"}
    assert dense.sparsity == 0 and all(row.sparsity == pytest.approx(0.6, abs=2e-3) for row in pruned)
    assert all(1 < row.perplexity < 1000 for row in shown.rows)
    assert dense.text.startswith("def ")


def test_the_embedded_model_is_small_and_fits_every_pattern() -> None:
    from llmsparse.checkpoint import CheckpointReader

    reader = CheckpointReader(demo.MODEL)
    assert sum(path.stat().st_size for path in demo.MODEL.iterdir()) <= 17e6
    matrices = [reader.spec(key) for key in reader.keys() if ".layers." in key and "norm" not in key]
    assert len(matrices) == 56
    assert all(size % 128 == 0 for spec in matrices for size in spec.shape)
