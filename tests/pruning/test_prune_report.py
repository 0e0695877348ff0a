"""Totals, warnings and the card."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from llmsparse.pruning.report import BlockRecord, PrunedWeight, PruneReport


def report(before: float = 10.0, after: float = 11.0, **protocol: Any) -> PruneReport:
    rows = [
        PrunedWeight("b.0.q", (4, 4), "wanda", "unstructured", 0.5, 0.5, 0.01, 100),
        PrunedWeight("b.0.up", (8, 4), "wanda", "unstructured", 0.25, 0.25, 0.02, 100, {"damp": 0.1}),
    ]
    made = PruneReport(
        model="tiny",
        output="out",
        recipe={"method": "wanda"},
        protocol={"dataset": "builtin", **protocol},
        versions={"torch": "2"},
    )
    made.blocks = [BlockRecord("b.0", rows, None, {"b.0": 1.0, "b.0.q": 0.5})]
    made.total_parameters = 160
    made.perplexity = {"before": before, "after": after, "windows": 8, "seq_len": 512, "tokens": 4088}
    made.warn()
    return made


def test_sparsity_is_zeros_over_elements_of_the_pruned_weights() -> None:
    made = report()
    assert made.zeros == 16
    assert made.sparsity == 16 / 48
    assert made.to_json()["sparsity_of_all_parameters"] == 16 / 160


def test_a_large_loss_is_said_plainly_with_a_hint_and_a_small_one_is_not() -> None:
    assert report(10, 12).warnings == []
    (warning,) = report(10, 40).warnings
    assert "4.0-fold" in warning and "--match-steps" in warning and "--sparsity" in warning
    assert len(report(10, float("nan")).warnings) == 1


def test_the_hint_fits_the_pattern_and_the_method() -> None:
    made = report(10, 40)
    made.warnings, rows = [], made.blocks[0].rows
    rows[:] = [replace(row, pattern="2:4", method="alps") for row in rows]
    made.warn()
    (warning,) = made.warnings
    assert "a looser --pattern such as 4:8 or unstructured" in warning
    assert "--sparsity" not in warning and "--method" not in warning


def test_a_text_that_ran_short_is_said() -> None:
    assert report(note="3 of 128 used").warnings == ["calibration: 3 of 128 used"]


def test_a_block_record_survives_the_journal() -> None:
    (record,) = report().blocks
    assert BlockRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_what_time_decides_stands_under_one_key() -> None:
    slow, fast = report(), report()
    slow.seconds, slow.peak_memory_bytes = 99.0, 10**9
    assert slow.stored()["timings"] != fast.stored()["timings"]
    assert {k: v for k, v in slow.stored().items() if k != "timings"} == {
        k: v for k, v in fast.stored().items() if k != "timings"
    }
    assert slow.to_json()["seconds"] == 99.0 and slow.to_json()["peak_memory_bytes"] == 10**9


def test_the_card_says_method_sparsity_perplexity_and_protocol() -> None:
    card = report().card()
    assert card.startswith("---\nbase_model: tiny\n")
    for part in ("wanda", "33%", "10 → 11", "8 held-out windows of 512 tokens", "dataset builtin"):
        assert part in card
