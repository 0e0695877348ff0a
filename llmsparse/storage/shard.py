"""One safetensors file: the header that says where each tensor lies, and the bytes behind it.

The format (https://huggingface.co/docs/safetensors) is 8 bytes of header length, a JSON header, the tensors' bytes.
`safetensors` itself maps a whole file to read it and needs all its tensors at once to write it. Here memory is the
tensors asked for and nothing else, so headers are parsed and laid out in this module, and reads are real reads into
fresh memory. Tensors of less than a byte an element (F4, F6) are not handled.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PLAIN = {"format": "pt"}  # metadata of a file of weights
CHECKED = 2**18  # elements looked at together: they stay in a cache
EXPONENTS = {  # dtype → its bits as an integer, and those of the exponent
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies: bytes [begin, end) of `file`, counted from the start of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself: `text` is the JSON as it lies there, `specs` are in the order of their bytes."""

    file: Path
    size: int
    mtime_ns: int
    text: bytes
    specs: dict[str, TensorSpec]


def read_header(file: Path) -> Header:
    """Read and check a file's header: its tensors must fill the file exactly, without gap or overlap."""
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            size = status.st_size
            prefix = stream.read(8)
            start = 8 + int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise CheckpointError(f"{file}: a Git LFS pointer, not the weights; run `git lfs pull`")
            if len(prefix) < 8 or start > size:
                raise CheckpointError(f"{file}: truncated or not safetensors: {size} bytes, header ends at {start}")
            header = stream.read(start - 8)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    specs = _specs(file, start, header)
    cursor = max((spec.end for spec in specs.values()), default=start)
    if cursor != size:
        fault = "truncated" if size < cursor else "corrupt"
        raise CheckpointError(f"{file}: {fault}: {size} bytes, its header wants {cursor}; download it again")
    return Header(file, size, status.st_mtime_ns, header, specs)


def header_of(file: Path, text: bytes) -> Header:
    """The header of a file that is not there, from its JSON: what it will hold, as far as a plan must know."""
    specs = _specs(file, 8 + len(text), text)
    return Header(file, max((spec.end for spec in specs.values()), default=8 + len(text)), 0, text, specs)


def _specs(file: Path, start: int, text: bytes) -> dict[str, TensorSpec]:
    """The tensors of a header's JSON in the order of their bytes, which begin at `start` and leave no gap."""
    try:
        entries: Any = json.loads(text.decode())
        entries.pop("__metadata__", None)
        specs = {key: _spec(file, start, key, entry) for key, entry in entries.items()}
        "".join(specs).encode()  # half of a surrogate pair is no name
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: corrupt safetensors header; download it again") from error
    specs = dict(sorted(specs.items(), key=lambda item: (item[1].begin, item[1].end)))
    cursor = start
    for key, spec in specs.items():
        if spec.begin != cursor:
            raise CheckpointError(f"{file}: corrupt header: tensor {key!r} begins at {spec.begin}, wanted {cursor}")
        cursor = spec.end
    return specs


def _spec(file: Path, start: int, key: str, entry: Mapping[str, Any]) -> TensorSpec:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{file}: tensor {key!r} has dtype {entry['dtype']}; known: {', '.join(DTYPES)}")
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    if not whole or end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{file}: corrupt header: tensor {key!r} of shape {list(shape)} {entry['dtype']} has bytes {begin} to {end}"
        )
    return TensorSpec(shape, dtype, file, start + begin, start + end)


def lay_out(
    file: Path, specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str] = PLAIN
) -> tuple[bytes, dict[str, TensorSpec]]:
    """Header of a shard and the place of each tensor: wider dtypes first, so that every tensor is aligned."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    cursor = 0
    for key in sorted(specs, key=lambda key: -specs[key][1].itemsize):
        shape, dtype = specs[key]
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{file}: tensor {key!r} has {dtype}, which safetensors cannot hold")
        end = cursor + math.prod(shape) * dtype.itemsize
        entries[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [cursor, end]}
        cursor = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    placed = {key: _spec(file, 8 + len(text), key, entry) for key, entry in entries.items() if key != "__metadata__"}
    return len(text).to_bytes(8, "little") + text, placed


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor: its own memory if it is contiguous, else a copy."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf: no number has all of its exponent's bits set. Looks at a part at a time,
    in next to no memory. 8-bit floats have scales of their own, and pass."""
    if tensor.dtype not in EXPONENTS:
        return True
    kind, exponent = EXPONENTS[tensor.dtype]
    bits = tensor.detach().view(kind).flatten()
    return all(
        int((bits[at : at + CHECKED] & exponent).amax()) != exponent for at in range(0, len(bits), CHECKED)
    )  # integers are masked at the speed of memory; torch.isfinite takes thirty times as long in bfloat16


def read_into(spec: TensorSpec, offset: int, target: memoryview) -> None:
    """Fill `target` from the tensor's bytes, beginning at `offset`."""
    try:
        with spec.file.open("rb", buffering=0) as stream:
            stream.seek(spec.begin + offset)
            while target:
                got = stream.readinto(target)
                if not got:
                    raise CheckpointError(f"{spec.file}: became shorter while it was read")
                target = target[got:]
    except OSError as error:
        raise CheckpointError(f"{spec.file}: cannot be read ({error.strerror})") from error
