"""Where a backend has been measured faster than dense: the table that ships with llmsparse, and the user's own.

Loading a model never times anything: what runs depends on these rows alone, not on the moment. `llmsparse bench --save`
writes the user's, in the cache folder; they come first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llmsparse.backends.protocol import WeightSpec
from llmsparse.errors import RecipeError

SHIPPED = Path(__file__).with_name("table.json")
VERSION = 1
Span = tuple[float, float]  # both ends included


@dataclass(frozen=True)
class Measurement:
    """In this region the backend beats dense: `speedup` is the least that was measured for one token."""

    backend: str
    device: str  # one of device_kinds()
    dtype: str
    pattern: str  # unstructured, N:M, or any
    sparsity: Span
    rows: Span
    columns: Span
    tokens: int  # up to as many at once
    speedup: float
    measured: str  # when, on what, with which versions

    def covers(self, spec: WeightSpec, kinds: Iterable[str]) -> bool:
        out, width = spec.shape[-2:]
        return (
            self.device in kinds
            and self.dtype == str(spec.dtype).removeprefix("torch.")
            and self.pattern in ("any", spec.pattern)
            and self.sparsity[0] <= spec.sparsity <= self.sparsity[1]
            and self.rows[0] <= out <= self.rows[1]
            and self.columns[0] <= width <= self.columns[1]
        )


def matching(spec: WeightSpec) -> list[Measurement]:
    """Rows that cover a weight: the user's first, then by the device they name, the most specific first."""
    kinds = device_kinds(spec.device)
    tables = (read(user_file()), shipped())
    covering = [[row for row in rows if row.covers(spec, kinds)] for rows in tables]
    return [row for rows in covering for row in sorted(rows, key=lambda row: kinds.index(row.device))]


@cache
def shipped() -> list[Measurement]:
    """The table that comes with llmsparse."""
    return read(SHIPPED)


def user_file() -> Path:
    """Where `bench --save` writes."""
    cache_folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_folder).expanduser() / "llmsparse" / "backends.json"


def save(rows: Iterable[Measurement], lost: Iterable[Measurement] = ()) -> Path:
    """Put rows into the user's table, in place of those that they say something new about; returns the file. Rows that
    say the same as one of `lost`, found not to be so, are taken out."""
    file, new = user_file(), list(rows)
    replaced = {_place(row) for row in (*new, *lost)}
    kept = [row for row in read(file) if _place(row) not in replaced]
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": VERSION, "rows": [asdict(row) for row in (*new, *kept)]}, indent=2)
    partial = file.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(file)
    return file


def read(file: Path) -> list[Measurement]:
    """The rows of a table; none where there is no file. RecipeError for one that is damaged."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{file}: cannot be read ({error}); delete it, or run llmsparse bench --save again"
        ) from error
    try:
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, wanted {VERSION}")
        return [_row(row) for row in content["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{file}: no table of backends ({error!r}); delete it, or run llmsparse bench --save"
        ) from error


@cache
def device_kinds(device: torch.device) -> tuple[str, ...]:
    """What a row may call a device, the most specific first: ('NVIDIA H200', 'sm_90'), ('cpu avx512_vbmi2', 'cpu')."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return torch.cuda.get_device_name(device), f"sm_{major}{minor}"
    if device.type == "cpu":
        flags = next((line for line in cpu_info() if line.startswith("flags")), "").split()
        level = next((name for name in ("avx512_vbmi2", "avx512f", "avx2") if name in flags), "portable")
        return f"cpu {level}", "cpu"
    return (device.type,)


@cache
def cpu_info() -> tuple[str, ...]:
    """The lines of /proc/cpuinfo; none where there is no such file."""
    try:
        return tuple(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines())
    except OSError:
        return ()


def _place(row: Measurement) -> tuple[Any, ...]:
    return tuple(
        getattr(row, field.name) for field in fields(Measurement) if field.name not in ("speedup", "measured", "tokens")
    )


def _row(content: dict[str, Any]) -> Measurement:
    spans: dict[str, Any] = {name: tuple(map(float, content[name])) for name in ("sparsity", "rows", "columns")}
    return Measurement(**content | spans)
