"""A reader of packed checkpoints, written from docs/packed-format.md with numpy and json alone.

`read(folder)` gives every tensor of the module, dense: name → array. bfloat16, which numpy lacks, comes as uint16.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
VALUES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


def read(folder: Path) -> dict[str, Any]:
    block = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (block["quant_method"], block["bit_order"]) == ("llmsparse", "little")
    assert block["format_version"] <= 2, "written by a later version"
    assert block.get("format") == ("bitmask" if block["format_version"] == 1 else None)
    tensors = {name: array for file in files(folder) for name, array in read_file(file).items()}
    for name, entry in block["layers"].items():
        nested = entry.get("format", "bitmask") == "nested"
        suffixes = ("", "_steps", "_tiles") if nested else ("", "_mask", "_offsets")
        parts = [tensors.pop(name + suffix, None) for suffix in suffixes]
        weight = unpack_nested(entry, *parts) if nested else unpack(entry, *parts)
        tensors[name] = weight.swapaxes(-1, -2) if entry.get("transposed") else weight
    return tensors


def files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})


def read_file(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[start + tensor["data_offsets"][0] : start + tensor["data_offsets"][1]], dtype)
        .reshape(tensor["shape"])
        for name, tensor in header.items()
        for dtype in [DTYPES[tensor["dtype"]]]
    }  # fmt: skip


def unpack(entry: dict[str, Any], values: Any, mask: Any, offsets: Any) -> Any:
    *leading, width = entry["shape"]
    rows = prod(leading)
    assert mask.dtype == np.uint8 and list(mask.shape) == [*leading, -(-width // 8)]
    assert values.dtype == VALUES[entry["dtype"]] and values.size == entry["nnz"]
    bits = np.unpackbits(mask.reshape(rows, -1), axis=1, bitorder="little").astype(bool)
    kept, beyond = bits[:, :width], bits[:, width:]
    assert not beyond.any()
    if entry["pattern"] == "unstructured":
        assert offsets[0] == 0 and (np.diff(offsets) == kept.sum(axis=1)).all()
    else:
        n, m = map(int, entry["pattern"].split(":"))
        assert (kept.reshape(-1, m).sum(axis=1) == n).all() and values.shape == (rows, width * n // m)
    weight = np.zeros((rows, width), values.dtype)
    weight[kept] = values.ravel()
    return weight.reshape(entry["shape"])


def unpack_nested(entry: dict[str, Any], stream: Any, steps: Any, tiles: Any) -> Any:
    *leading, out, width = entry["shape"]
    rows, together = prod(leading) * out, entry.get("step_rows", 1)
    assert len(stream) == entry["bytes"] and steps.shape == (rows // together, -(-width // entry["group"]))
    assert out % together == 0 and (together == 1 or not leading)
    q = np.zeros((rows, width), np.float32)
    starts = [m * out + r for m in range(prod(leading)) for r in range(0, out, entry["tile"])]
    assert len(tiles) == len(starts) + 1 and tiles[0] == 0 and tiles[-1] == len(stream)
    for number, start in enumerate(starts):
        stop = min(start + entry["tile"], (start // out + 1) * out)
        tile = stream[tiles[number] : tiles[number + 1]]
        q[start:stop] = numbers(tile, (stop - start) * width, entry["digits"], entry["fours"]).reshape(-1, width)
    assert np.count_nonzero(q) == entry["nnz"]
    of_groups = (steps.astype(np.uint32) << 16).view(np.float32).repeat(together, axis=0)
    each = of_groups[:, np.arange(width) // entry["group"]]
    return rounded(q * each, entry["dtype"]).reshape(entry["shape"])


def numbers(tile: Any, places: int, digits: list[int], fours: list[int]) -> Any:
    """Level after level, a list of what is still open shrinking."""
    q, still, signs, reached = np.zeros(places), np.arange(places), np.ones(0), 0
    for level, d in enumerate(digits):
        if level in fours:
            some, tile = digits_of(tile, -(-len(still) // 4), 1)
            flags, tile = digits_of(tile, 4 * int(some.sum()), 1)
            s = np.zeros((len(some), 4), int)
            s[some == 1] = flags.reshape(-1, 4)
            assert not s.ravel()[len(still) :].any()
            s = s.ravel()[: len(still)]
        else:
            s, tile = digits_of(tile, len(still), d)
        more = s == 2**d - 1
        if level == 0:
            q = (s + 1) // 2 * np.where(s % 2 == 1, 1, -1)
            final = 2 ** (d - 1) - 1
        elif level == 1:
            signs, more, final = np.where(s % 2 == 1, -1, 1), s // 2 == 2 ** (d - 1) - 1, reached + 2 ** (d - 1) - 1
            q[still] = signs * (reached + 1 + s // 2)
        else:
            q[still], final = signs * (reached + 1 + s), reached + 2**d - 1
        if level == len(digits) - 1:
            assert (level > 0 or not more.any()) and abs(q).max(initial=0) <= 127
        still, signs, reached = still[more], signs[more] if level else signs, final
    assert len(tile) == 0, "bytes behind the last level"
    return q


def digits_of(tile: Any, count: int, d: int) -> tuple[Any, Any]:
    size = -(-count * d // 8)
    bits = np.unpackbits(tile[:size], bitorder="little").astype(int)
    assert len(bits) == 8 * size and not bits[count * d :].any()
    return (bits[: count * d].reshape(count, d) << np.arange(d)).sum(1), tile[size:]


def rounded(weight: Any, dtype: str) -> Any:
    """float32 → the dtype, to nearest even; bfloat16 as its bits."""
    if dtype != "bfloat16":
        return weight.astype(VALUES[dtype])
    bits = weight.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
