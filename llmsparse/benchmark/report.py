"""What `bench` found: a table that a person reads, and JSON that a machine reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmsparse.benchmark.decoding import Decoding
    from llmsparse.benchmark.timing import Spread

DENSE = "dense"
GAIN = 1.05  # of medians, from which on a backend counts as faster: less is what two runs of the same thing differ by


@dataclass(frozen=True)
class Speed:
    """A backend on one weight and batch. GB/s are the bytes of the dense weight, or of the packed one, over the time."""

    backend: str
    seconds: Spread
    speedup: float  # over dense, by medians
    gb_per_second: float
    of_copy: float  # the same over the copy bandwidth of the device
    streamed: bool  # the copies together are larger than the cache, so that the weight came from memory


@dataclass(frozen=True)
class Speeds:
    """All backends that take `batch` rows of x, dense among them."""

    batch: int
    speeds: list[Speed]
    refused: dict[str, str]  # backends that only take fewer

    @property
    def best(self) -> Speed:
        return min(self.speeds, key=lambda speed: speed.seconds.median)

    @property
    def gain(self) -> bool:
        """Something is faster than dense."""
        return self.best.speedup >= GAIN

    def speedup(self, backend: str) -> float | None:
        return next((speed.speedup for speed in self.speeds if speed.backend == backend), None)


@dataclass(frozen=True)
class Measured:
    """One weight, standing for `count`."""

    name: str
    count: int
    shape: tuple[int, int]
    dtype: str
    pattern: str
    sparsity: float
    dense_bytes: int
    packed_bytes: int
    refused: dict[str, str]  # backend → why it cannot run this weight here
    limits: dict[str, int | None]  # backend → how many rows of x it is for; None: any number
    tables: list[Speeds]


@dataclass(frozen=True)
class MixtureMeasured:
    """The FFN of a block that is a mixture of experts, standing for `count`, beside a dense one of all its neurons. GB/s
    are the bytes of the experts that a batch chose and of what runs for every token, or those of the dense FFN."""

    name: str
    count: int
    experts: int  # routed
    inner: int  # neurons of each
    width: int
    neurons: int  # of all, shared ones too
    dtype: str
    dense_bytes: int
    touched: dict[int, float]  # batch → routed experts that it chooses, on average
    tables: list[Speeds]


@dataclass(frozen=True)
class Benchmark:
    """What `llmsparse bench` shows."""

    what: str
    protocol: dict[str, Any]
    versions: dict[str, str | None]
    measured: list[Measured]
    mixtures: list[MixtureMeasured] = field(default_factory=list[MixtureMeasured])
    decodings: list[Decoding] = field(default_factory=list["Decoding"])
    not_decoded: str | None = None
    saved: str | None = None
    saved_rows: int = 0

    def fastest(self) -> str | None:
        """The backend that takes least time over all weights at the smallest batch; None where none runs them all."""
        totals: dict[str, float] = {}
        first = [(one.count, one.tables[0].speeds) for one in self.measured]
        for speed in first[0][1] if first else []:
            times = [
                count * other.seconds.median
                for count, speeds in first
                for other in speeds
                if other.backend == speed.backend
            ]
            if len(times) == len(first):
                totals[speed.backend] = sum(times)
        return min(totals, key=lambda name: totals[name]) if totals else None

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        both = (*self.measured, *self.mixtures)
        for one, described in zip(both, content["measured"] + content["mixtures"], strict=True):
            for speeds, written in zip(one.tables, described["tables"], strict=True):
                written |= {"best": speeds.best.backend, "gain": speeds.gain}
        return content

    def table(self) -> RenderableType:
        from rich.console import Group

        parts = [part for one in self.measured for part in (_table(one), "")]
        parts += [part for one in self.mixtures for part in (_mixture(one), "")]
        refused = {name: reason for one in self.measured for name, reason in one.refused.items()}
        lines = [f"not {name}: {reason}" for name, reason in refused.items()]
        both = (*self.measured, *self.mixtures)
        if not all(speed.streamed for one in both for speeds in one.tables for speed in speeds.speeds):
            lines.append("* stays in the cache, also as 64 copies: no statement about memory")
        if self.decodings:
            parts += [_decodings(self.decodings), ""]
        elif self.not_decoded:
            lines.append(f"no decoding: {self.not_decoded}")
        return Group(*parts, *lines, *self._about())

    def _about(self) -> list[str]:
        p = self.protocol
        threads = (
            f", {p['threads']} thread{'s' if p['threads'] > 1 else ''}{' bound to cores' if p['threads_bound'] else ''}"
            if "CUDA" not in p["timed"]
            else ""
        )
        lines = [
            f"{p['device']}{threads}; timed by {p['timed']}; median and quartiles, all candidates by turns; GB/s of the "
            f"weight's bytes, dense or packed; a copy here runs at {p['copy_gb_per_second']:.1f} GB/s, read and written",
            ", ".join(f"{name} {number or 'missing'}" for name, number in self.versions.items()),
        ]
        if self.saved is not None:
            lines.append(f"{self.saved_rows} rows saved to {self.saved}, which `auto` reads")
        return lines


def _table(one: Measured) -> RenderableType:
    title = f"{one.shape[0]}×{one.shape[1]} {one.dtype}, {one.pattern}, sparsity {one.sparsity:.3f}"
    title += f"; packed {one.packed_bytes / max(1, one.dense_bytes):.3f} × dense; {one.count} like {one.name}"
    return _speeds(title, one.tables)


def _mixture(one: MixtureMeasured) -> RenderableType:
    chosen = ", ".join(f"{touched:.1f} for {batch}" for batch, touched in one.touched.items())
    title = f"FFN of {one.neurons} neurons × {one.width}, {one.dtype}, {one.experts} routed experts of {one.inner}"
    title += f"; chosen by a batch: {chosen}; {one.count} like {one.name}"
    return _speeds(title, one.tables)


def _speeds(title: str, tables: list[Speeds]) -> RenderableType:
    """Title and notes are lines of their own: a table would break them to its own width."""
    from rich.console import Group
    from rich.table import Table

    columns = ("batch", "backend", "µs", "quartiles", "× dense", "GB/s", "of copy", "")
    table = Table(*columns, box=None, pad_edge=False)
    for speeds in tables:
        for number, speed in enumerate(sorted(speeds.speeds, key=lambda speed: speed.seconds.median)):
            t = speed.seconds
            verdict = ("fastest" if speeds.gain else "no gain here: dense is as fast") if number == 0 else ""
            table.add_row(
                str(speeds.batch) if number == 0 else "",
                speed.backend,
                f"{t.median * 1e6:.1f}",
                f"{t.p25 * 1e6:.1f}–{t.p75 * 1e6:.1f}",
                f"{speed.speedup:.2f}",
                f"{speed.gb_per_second:.1f}{'' if speed.streamed else ' *'}",
                f"{speed.of_copy:.0%}",
                verdict,
            )
    notes = {name: reason for speeds in tables for name, reason in speeds.refused.items()}
    lines = ["; ".join(f"{name} {reason}" for name, reason in notes.items())] if notes else []
    return Group(title, table, *lines)


def _decodings(decodings: list[Decoding]) -> RenderableType:
    from rich.table import Table

    dense = decodings[0]
    beside = f"× {dense.run}"
    table = Table("decoding", "tokens/s", "least–most", beside, "GB", beside, box=None, pad_edge=False)
    for one in decodings:
        speed = one.tokens_per_second / dense.tokens_per_second if dense.tokens_per_second else 0.0
        table.add_row(
            one.run,
            f"{one.tokens_per_second:.2f}",
            f"{one.least:.2f}–{one.most:.2f}",
            f"{speed:.2f}",
            f"{one.memory_bytes / 1e9:.3f}",
            f"{one.memory_bytes / dense.memory_bytes:.3f}",
        )
    gain = len(decodings) > 1 and decodings[-1].tokens_per_second >= GAIN * dense.tokens_per_second
    table.caption = None if gain else "no gain in speed here"
    table.caption_justify = "left"
    return table
