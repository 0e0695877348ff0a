"""Rows of a table in eval/results: put at its end, or in its place. All have the same columns, which its head names."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def append(table: Path, rows: Sequence[dict[str, Any]]) -> None:
    _write(table, rows, "a")


def write(table: Path, rows: Sequence[dict[str, Any]]) -> None:
    _write(table, rows, "w")


def _write(table: Path, rows: Sequence[dict[str, Any]], mode: str) -> None:
    headed = mode == "a" and table.exists()
    with table.open(mode, newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        if not headed:
            writer.writeheader()
        writer.writerows(rows)
