"""What sparsity pays once it is packed: bytes on disk, tokens per second, and the time of one large matrix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from llmsparse.benchmark.run import DENSE, bench
from llmsparse.inference.generate import generate
from llmsparse.packing.pack import pack

if TYPE_CHECKING:
    from rich.console import RenderableType

PROMPT = "def "
TOKENS = 64
TURNS = 3  # dense and packed generate by turns; the median counts
MATRIX = "11008x4096"  # out × in: the gate of a Llama-2-7B, 90 MB in bf16, which no cache holds
SECONDS = 1.0  # for each pattern
PATTERNS = (("unstructured", 0.6), ("unstructured", 0.7), ("2:4", 0.5))


@dataclass(frozen=True)
class MatrixSpeed:
    """One token through MATRIX in bf16: dense by torch, and packed by the backend that is fastest here."""

    pattern: str
    sparsity: float
    dense_seconds: float
    packed_seconds: float
    backend: str
    gain: bool  # False: dense is as fast


@dataclass(frozen=True)
class SizeAndSpeed:
    """A pruned checkpoint of the demo, dense beside packed."""

    label: str
    weight_bytes: int  # of the pruned weights, packed
    weight_dense_bytes: int
    checkpoint_bytes: int
    checkpoint_dense_bytes: int
    tokens_per_second: float  # greedy, one sequence
    dense_tokens_per_second: float
    matrix: list[MatrixSpeed]
    device: str
    text: str  # generated from the packed form

    def table(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        table = Table(f"{self.label}, packed", "dense", "packed", "ratio", box=None, pad_edge=False)
        sizes = {
            "pruned weights, MB": (self.weight_dense_bytes, self.weight_bytes),
            "checkpoint, MB": (self.checkpoint_dense_bytes, self.checkpoint_bytes),
        }
        for what, (dense, packed) in sizes.items():
            table.add_row(what, f"{dense / 1e6:.2f}", f"{packed / 1e6:.2f}", f"{packed / dense:.2f} ×")
        dense, packed = self.dense_tokens_per_second, self.tokens_per_second
        table.add_row("tokens/s", f"{dense:.0f}", f"{packed:.0f}", f"{packed / dense:.2f} ×")
        speed = Table(
            f"one token through {MATRIX.replace('x', ' × ')}, µs", "dense", "packed", "ratio", box=None, pad_edge=False
        )
        for one in self.matrix:
            speed.add_row(
                f"{one.pattern}, {one.sparsity:.0%}",
                f"{one.dense_seconds * 1e6:.0f}",
                f"{one.packed_seconds * 1e6:.0f}",
                f"{one.dense_seconds / one.packed_seconds:.2f} × ({one.backend})" if one.gain else "no gain here",
            )
        speed.caption = f"medians, in bf16 on {self.device}; `llmsparse bench` shows more"
        speed.caption_justify = "left"
        return Group(table, "", speed)


def size_and_speed(label: str, folder: Path, packed: Path) -> SizeAndSpeed:
    """Pack the pruned checkpoint at `folder` into the new folder `packed`, and measure both."""
    packing = pack(str(folder), packed)
    dense_speed, packed_speed, text = _tokens_per_second(folder, packed)
    matrix, device = _matrix()
    return SizeAndSpeed(
        label, packing.packed_bytes, packing.packed_dense_bytes, packing.bytes, packing.dense_bytes, packed_speed,
        dense_speed, matrix, device, text,
    )  # fmt: skip


def _tokens_per_second(dense: Path, packed: Path) -> tuple[float, float, str]:
    """The first turn of each warms up; the text is the packed one's."""
    speeds: dict[Path, list[float]] = {dense: [], packed: []}
    text = ""
    for turn in range(TURNS + 1):
        for folder, taken in speeds.items():
            result = generate(str(folder), PROMPT, max_new_tokens=TOKENS)
            text = result.prompt + result.text
            if turn:
                taken.append(result.tokens_per_second or 0.0)
    return median(speeds[dense]), median(speeds[packed]), text


def _matrix() -> tuple[list[MatrixSpeed], str]:
    rows: list[MatrixSpeed] = []
    device = ""
    for pattern, sparsity in PATTERNS:
        found = bench(shapes=MATRIX, pattern=pattern, sparsity=sparsity, batches=(1,), seconds=SECONDS)
        speeds = found.measured[0].tables[0]
        times = {speed.backend: speed.seconds.median for speed in speeds.speeds}
        packed = min((name for name in times if name != DENSE), key=lambda name: times[name])
        gain = speeds.gain and speeds.best.backend == packed
        rows.append(MatrixSpeed(pattern, sparsity, times[DENSE], times[packed], packed, gain))
        p = found.protocol
        device = p["device"] + (f" ({p['threads']} threads)" if "CUDA" not in p["timed"] else "")
    return rows, device
