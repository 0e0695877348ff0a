"""Totals, warnings and the card."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

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


def warnings(*rows: PrunedWeight, match: dict[str, Any] | None = None) -> list[str]:
    made = report()
    made.blocks, made.warnings = [BlockRecord("b.0", list(rows), match, {})], []
    made.warn()
    return made.warnings


def row(method: str = "wanda", tokens: int = 100, **notes: Any) -> PrunedWeight:
    return PrunedWeight("b.0.e", (8, 64), method, "unstructured", 0.5, 0.5, 0.1 if tokens else None, tokens, notes)


def test_starved_experts_are_counted_and_what_they_fell_back_to_is_named() -> None:
    (warning,) = warnings(
        row(tokens=0, fallback="magnitude: no calibration tokens reached it, wanda wants 32"),
        row("sparsegpt", 40, fallback="wanda: 40 calibration tokens reached it, sparsegpt wants 96"),
        row(),
    )
    assert "2 weights of experts saw too few calibration tokens, 1 of them none at all" in warning
    assert "by magnitude or wanda, b.0.e first" in warning and "--calibration-samples" in warning


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_a_hessian_of_fewer_tokens_than_inputs_is_warned_of(method: str) -> None:
    (warning,) = warnings(row(method, 63), row(method, 64))
    assert warning.startswith("1 weights have more inputs than calibration has tokens") and "64 inputs, 63" in warning
    assert not warnings(row("wanda", 63), row("dsnot", 63))


def test_a_mask_that_had_not_settled_is_said() -> None:
    (warning,) = warnings(row("alps", settled=False, iterations=3), row("alps", settled=True, iterations=30))
    assert warning.startswith("the masks of 1 weights had not settled after 3 iterations, b.0.e first")


def test_a_block_that_matching_did_not_improve_is_said() -> None:
    better = {
        "before": 0.2,
        "after": 0.1,
        "steps": 3,
        "learning_rate": 0.1,
        "validation": True,
        "improved": True,
        "of": "output",
    }
    assert not warnings(row(), match=better)
    (warning,) = warnings(row(), match=better | {"after": 0.2, "improved": False})
    assert warning.startswith("matching improved 0 of 1 blocks; the others, b.0 first, stay as they were pruned")


def test_errors_of_outputs_and_of_logits_are_told_apart() -> None:
    made = report()
    output = {
        "before": 0.2,
        "after": 0.1,
        "steps": 3,
        "learning_rate": 0.1,
        "validation": True,
        "improved": True,
        "of": "output",
    }
    logits = output | {"before": 1.5, "after": 0.5, "of": "logits"}
    made.blocks = [replace(made.blocks[0], match=match) for match in (output, output | {"after": 0.2}, logits)]
    line = dict(made.findings())["matching"]
    assert (
        line
        == "3 steps a block, mean validation error of the output 0.2000 → 0.1500, of the logits 1.5000 → 0.5000 nats"
    )


def test_zeros_that_came_back_are_counted() -> None:
    assert not warnings(row(zeros_before=0.5, zeros_returned=0))
    (warning,) = warnings(row(zeros_before=0.5, zeros_returned=3))
    assert "3 of the 256 zeros" in warning and "--keep-zeros" in warning


def test_a_perplexity_that_is_no_number_is_said() -> None:
    (warning,) = report(10, float("nan")).warnings
    assert "NaN" in warning and "--dtype float32" in warning


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
