"""Damaged packed folders through the reader and the kernels: `python fuzz_packed.py ROUNDS SEED FOLDER`, FOLDER empty.

Each round changes config, header, tensors or record in a few places and reads what is left. It must be an error in one
line, or the weights that an independent reader finds there (packed_reader.py): never another exception, a crash, a hang,
or memory out of proportion. Prints `all right` and what was found how often; else the round and what went wrong.
"""

from __future__ import annotations

import copy
import json
import math
import random
import resource
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import packed_reader

from llmsparse.backends import BACKENDS, WeightSpec, cpu
from llmsparse.backends.cpu import nested
from llmsparse.errors import LlmsparseError
from llmsparse.formats import PackedTensor
from llmsparse.formats.bitmask import Bitmask
from llmsparse.formats.nested import Nested
from llmsparse.models.origin import is_packed, read_config
from llmsparse.packing.folder import RECORD, PackedCheckpoint, quantization_config
from llmsparse.storage.checkpoint import SINGLE

MEMORY = 4 << 30  # of address space, above what the process starts with: nothing here is larger than some kB
HANGS = 120  # seconds that no round takes
WIDTHS = {"up": (6, 40, "unstructured"), "down": (5, 16, "2:4"), "wide": (3, 130, "unstructured")}
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, 1.0, 2.0,
    1e400, float("nan"), "", "0", "1", "2:4", "4:2", "0:4", "1:8", "4:8", "2:4294967296", "unstructured", "row", "matrix", "bfloat16",
    "float32", "float16", "float64", "float8_e4m3fn", "int8", "bool", "complex64", "nn", "Tensor", "__name__", "float", "BF16", "F32",
    "U8", "I64", "F4", "big", "\u0000", "../x", "x" * 300, [], {}, [[]], [0], [1], [0, 0], [1, 2, 3], [2**40, 0], [0, 2**40], [2**62, 4],
    [2**33, 2**33], [-1, 5], [4, "4"], {"a": 1}, [None, 4],
]  # fmt: skip


def sound(folder: Path) -> None:
    """A packed folder with a weight of every kind."""
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {"norm.weight": torch.ones(5)}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for leaf, (rows, width, pattern) in WIDTHS.items():
            for lead in ((), (2,)):
                weight = torch.randn(*lead, rows, width, generator=generator)
                keep = torch.rand(weight.shape, generator=generator) < 0.4
                if pattern == "2:4":
                    keep = torch.arange(width).remainder(4).lt(2).expand(weight.shape)
                packed = Bitmask.pack(weight.masked_fill(~keep, 0.0).to(dtype), pattern)
                name = f"{leaf}{len(lead)}.{str(dtype)[6:]}"
                layers[name] = packed.describe() | ({"transposed": True} if rows == 6 else {})
                tensors |= {name + end: tensor for end, tensor in packed.tensors().items()}
        for spread, groups in ((0.7, 1), (3.0, 2), (40.0, 1)):
            q = (torch.randn(2, 6, 20, generator=generator) * spread).round().clamp(-127, 127).to(torch.int8)
            steps = torch.rand(12, groups, generator=generator).to(torch.bfloat16)
            few, name = Nested.encode(q, steps, dtype), f"few{spread:g}.{str(dtype)[6:]}"
            layers[name] = few.describe()
            tensors |= {name + end: tensor for end, tensor in few.tensors().items()}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "x", "quantization_config": quantization_config(layers)})
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8", torch.int32: "I32"}
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        span = [len(body), len(body) + len(data)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        body += data
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + body)
    record = {"format_version": 1, "versions": {"llmsparse": "0"}, "checksums": {}, "files": {}, "tensors": {}}
    (folder / RECORD).write_text(json.dumps(record))


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into nested JSON."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inside for place in places(item, (*at, key)))]


def changed(value: Any, draw: random.Random) -> Any:
    """The same JSON, other in one place."""
    at = draw.choice(places(value))
    if not at:
        return draw.choice(ODD) if draw.random() < 0.02 else value
    owner = value
    for key in at[:-1]:
        owner = owner[key]
    old, way = owner[at[-1]], draw.random()
    if way < 0.15:
        del owner[at[-1]]
    elif way < 0.25 and isinstance(owner, dict):
        owner[draw.choice([*owner, "x", "transposed", at[-1] + "_mask"])] = copy.deepcopy(old)
    elif way < 0.6 and type(old) is int:
        owner[at[-1]] = draw.choice(
            [old + 1, old - 1, old * 2, old // 2, -old, old + 2**32, old + 2**64, old ^ 1 << draw.randrange(40)]
        )
    elif way < 0.7 and isinstance(old, list):
        owner[at[-1]] = draw.choice([old[::-1], [*old, 1], old[:-1], [1, *old], [*old, *old]])
    else:
        owner[at[-1]] = copy.deepcopy(draw.choice(ODD))
    return value


class Fuzzer:
    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((source / "config.json").read_text())
        self.record = json.loads((source / RECORD).read_text())
        data = (source / SINGLE).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        self.header, self.body = json.loads(data[8:start]), data[start:]
        marks = ("_mask", "_offsets", "_tiles", "_steps")
        self.neutral = [
            span["data_offsets"] for name, span in self.header.items() if name.endswith(marks) or "few" in name
        ]
        self.written: dict[str, bytes] = {}
        self.config_text, self.record_text = json.dumps(self.config), json.dumps(self.record)

    def damage(self, draw: random.Random) -> None:
        """Write the folder again, other in a few places."""
        config, header, body, record = self.config_text, None, bytearray(self.body), self.record_text
        prefix: Callable[[bytes], bytes] = lambda text: len(text).to_bytes(8, "little")  # noqa: E731
        tail = 0
        for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
            what = draw.random()
            if what < 0.35:
                block = json.loads(config)
                block["quantization_config"] = changed(block["quantization_config"], draw)
                config = json.dumps(block)
            elif what < 0.5:
                header = changed(copy.deepcopy(header or self.header), draw)
            elif what < 0.88:
                begin, end = draw.choice(self.neutral) if draw.random() < 0.9 else (0, len(body))
                at = draw.randrange(begin, end)
                if draw.random() < 0.5:
                    body[at] ^= 1 << draw.randrange(8)
                    if draw.random() < 0.5:  # as many bits as before, at another place
                        body[draw.randrange(max(begin, at - 2), min(end, at + 3))] ^= 1 << draw.randrange(8)
                else:
                    at -= (at - begin) % 4
                    body[at : at + 4] = draw.choice(
                        (b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xff" * 4, draw.randbytes(4))
                    )
            elif what < 0.93:
                tail = draw.choice((-1, -7, -100, 1, 8, -len(body)))
            elif what < 0.97:
                size = draw.choice((0, 1, 7, 2**31, 2**63, 2**64 - 1, draw.randrange(4000)))
                prefix = lambda text, size=size: size.to_bytes(8, "little")  # noqa: E731
            else:
                record = json.dumps(changed(json.loads(record), draw))
        text = json.dumps(header or self.header).encode()
        contents = bytes(body) if not tail else bytes(body[:tail]) if tail < 0 else bytes(body) + bytes(tail)
        self.write("config.json", config.encode())
        self.write(SINGLE, prefix(text) + text + contents)
        self.write(RECORD, record.encode())

    def write(self, name: str, content: bytes) -> None:
        if self.written.get(name) != content:
            (self.folder / name).write_bytes(content)
            self.written[name] = content

    def round(self, draw: random.Random) -> str:
        """Damage, read; what came of it in a word."""
        self.damage(draw)
        try:
            if not is_packed(read_config(self.folder)):
                return "not packed"
            checkpoint = PackedCheckpoint(self.folder)
            weights = {name: checkpoint.weight(name) for name in checkpoint.layers}
        except LlmsparseError as error:
            assert "\n" not in str(error), "an error of more than a line"
            return type(error).__name__
        with np.errstate(all="raise", under="ignore"):
            expected = packed_reader.read(self.folder)
        for name, packed in weights.items():
            check(packed, checkpoint.module_tensor(name), expected[name])
        return "read"


def check(packed: PackedTensor, dense: Tensor, expected: Any) -> None:
    """A weight that was let through is what the independent reader says, in every form that it takes."""
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[packed.dtype.itemsize]
    bits = dense.contiguous().view(torch.uint8).numpy().view(kind) if dense.numel() else np.zeros(dense.shape, kind)
    assert bits.shape == expected.shape and (bits == np.ascontiguousarray(expected).view(kind)).all(), "other numbers"
    weight = packed.unpack()
    if len(packed.shape) > 2 and math.prod(packed.shape[:-2]):
        out = packed.shape[-2]
        parts = [packed.rows(e * out, (e + 1) * out) for e in range(math.prod(packed.shape[:-2]))]
        assert same(type(packed).joined(parts), packed), "other parts"
    spec = WeightSpec.of(packed)
    if isinstance(packed, Nested) and not BACKENDS["cpu-nested"].why_not(spec):
        few = nested.prepare(packed)
        assert torch.equal(few.numbers(), packed.numbers()), "other numbers by the kernels"
        assert torch.equal(nested.expand(few, torch.empty_like(weight)), weight), "not unpacked by the kernels"
    if isinstance(packed, Bitmask) and packed.dtype in (torch.bfloat16, torch.float32):
        held = cpu.prepare(packed)
        assert same(held.packed(), packed), "not restored"
        assert torch.equal(cpu.expand(held, torch.empty_like(weight)).view(torch.uint8), weight.view(torch.uint8)), (
            "not unpacked"
        )


def same(one: PackedTensor, other: PackedTensor) -> bool:
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def main(rounds: int, seed: int, folder: Path) -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    source, damaged = folder / "sound", folder / "damaged"
    source.mkdir(), damaged.mkdir()
    sound(source)
    fuzzer, found = Fuzzer(source, damaged), Counter[str]()
    cpu.why_not(), nested.why_not()  # builds the kernels, which takes longer than a round may
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    for number in range(rounds):
        signal.alarm(HANGS)  # SIGALRM ends the process
        try:
            found[fuzzer.round(random.Random(f"{seed}.{number}"))] += 1
        except BaseException as error:
            print(f"round {number} of seed {seed}: {type(error).__name__}: {error}")
            shutil.copytree(damaged, folder / "failed")
            raise
    print("all right:", json.dumps(dict(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
