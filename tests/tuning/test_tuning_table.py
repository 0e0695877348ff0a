"""The table of tuning figures: what a row says, and that rows are replaced, not piled up."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

import llmsparse
from eval import tune as table


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = {"STEPS": 2, "WINDOWS": 4, "SEQ_LEN": 32, "DTYPE": "float32", "RESULTS": tmp_path / "tune.csv"}
    for name, value in small.items():
        monkeypatch.setattr(table, name, value)


def test_a_row_is_what_a_stranger_measures(
    short: None, tiny_llama: Callable[..., Path], notes: Path, tmp_path: Path
) -> None:
    dense = tiny_llama(tmp_path / "tiny", ffn=128, layers=1)
    for _ in range(2):
        results = table.run(str(dense), str(notes), 0, ["router"])
    with table.RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["train"], row["steps"], row["tokens_per_step"]) for row in rows] == [
        ("tiny", "router", "2", "128")
    ]
    expected = llmsparse.perplexity(str(dense), str(notes), seq_len=32, device="cpu", dtype="float32")
    assert float(rows[0]["dense"]) == pytest.approx(expected.perplexity, abs=1e-3)
    assert int(rows[0]["measured_tokens"]) == expected.tokens
    assert results[0].ratio_after == pytest.approx(results[0].after / results[0].dense, abs=1e-4)
    assert "transformers" in rows[0]["versions"]
