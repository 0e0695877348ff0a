"""Rows put at the end of a table in eval/results."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def append(table: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All of the same columns, which the head of a new table names."""
    new = not table.exists()
    with table.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
