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
    assert (block["quant_method"], block["format"], block["bit_order"]) == ("llmsparse", "bitmask", "little")
    assert block["format_version"] <= 1, "written by a later version"
    tensors = {name: array for file in files(folder) for name, array in read_file(file).items()}
    for name, entry in block["layers"].items():
        parts = [tensors.pop(name + suffix, None) for suffix in ("", "_mask", "_offsets")]
        tensors[name] = unpack(entry, *parts)
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
    weight = weight.reshape(entry["shape"])
    return weight.swapaxes(-1, -2) if entry.get("transposed") else weight
