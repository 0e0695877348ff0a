"""The figure of eval/results/frontier.csv, and how many bits fewer `quantize` takes for the same perplexity.

`python -m eval.frontier_figure` writes docs/frontier.svg and prints a line for each rival's point: the bits at which `quantize`
loses as much, log(loss) being interpolated between its own points, and how many that saves. Points are means over seeds. A last
panel sets the loss of the embedded model against the time that a token takes for a billion weights, of eval/results/frontier_speed.csv:
exactly, or where a line is broken with activations of 8 bits, whose own rounding no loss has: eval/results/int8.csv does.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean

RESULTS = Path(__file__).parent / "results" / "frontier.csv"
SPEED = Path(__file__).parent / "results" / "frontier_speed.csv"
FIGURE = Path(__file__).parent.parent / "docs" / "frontier.svg"
TITLES = {"embedded": "embedded model, 7 M, code", "babyllama-tok361": "babyllama, 15 M, stories"}
OURS = "quantize"
MATCHED = " matched"  # behind a setting
LINES = {  # method → its name in the figure, and its colour
    OURS: ("llmsparse quantize", "#d1242f"),
    "quantize-matrix": ("--group matrix", "#fb8f44"),
    "gptq": ("GPTQ, groups", "#0969da"),
    "llama.cpp": ("llama.cpp + imatrix", "#8250df"),
    "rtn": ("nearest, groups", "#6e7781"),
    "mask": ("mask, bf16 values", "#1a7f37"),
    "mask-int4": ("mask, int4 values", "#9a6700"),
    "mask-int8": ("mask, int8 values", "#57606a"),
}
LEAST_LOSS = 1e-3  # less is noise of a seed
BITS = (1.6, 10.0), (2, 3, 4, 6, 8), "stored bits a weight, everything counted"
TIMES = (
    (18.0, 180.0),
    (20, 30, 50, 75, 100, 150),
    "ms of one core a token, for 10⁹ weights; broken: activations of 8 bits, whose rounding is in no loss here",
)
TIMED = "embedded"
FOUR_BITS = "4 g32"  # in the table of times, stands for 4 bits in any groups
WIDTH, HEIGHT, LEFT, TOP, GAP, BELOW = 440, 230, 58, 62, 36, 310


@dataclass(frozen=True)
class Point:
    """Mean over seeds."""

    setting: str
    at: float  # bits, or milliseconds
    loss: float
    seeds: int


Table = Mapping[str, Mapping[str, Sequence[Point]]]  # model → method → points by bits


def read() -> Table:
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in csv.DictReader(RESULTS.open(encoding="utf-8")):
        if row["method"] != "dense":
            found[row["model"], row["method"], row["setting"]].append((float(row["bits"]), float(row["loss"])))
    table: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for (model, method, setting), runs in found.items():
        point = Point(setting, fmean(bits for bits, _ in runs), fmean(loss for _, loss in runs), len(runs))
        table[model][method].append(point)
    for methods in table.values():
        for points in methods.values():
            points.sort(key=lambda point: point.at)
    return table


def bits_for(points: Sequence[Point], loss: float) -> float | None:
    """Where a line of points loses as much, or None where it does not reach."""
    for few, more in pairwise(points):
        if more.loss <= loss <= few.loss and more.loss > LEAST_LOSS:
            share = math.log(few.loss / loss) / math.log(few.loss / more.loss)
            return few.at + share * (more.at - few.at)
    return None


def savings(table: Table) -> Iterator[str]:
    for model, methods in table.items():
        line = [point for point in methods[OURS] if MATCHED not in point.setting]
        for method in LINES:
            for point in methods.get(method, ()) if not method.startswith(OURS) else ():
                ours = bits_for(line, point.loss)
                if ours is not None:
                    yield (
                        f"{model:17} {method:10} {point.setting:12} {point.at:5.2f} bits, loss {point.loss:.4f} "
                        f"({point.seeds} seeds): {ours:.2f} bits, {point.at - ours:.2f} fewer"
                    )


def timed(table: Table) -> Mapping[str, Mapping[str, Sequence[Point]]]:
    """activations → method → points by time: losses of the embedded model, in the order of their bits."""
    losses = {(method, point.setting): point for method, points in table[TIMED].items() for point in points}
    four = next(point for point in table[TIMED]["gptq"] if point.setting.startswith("4 "))
    losses["gptq", FOUR_BITS] = four
    found: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for row in csv.DictReader(SPEED.open(encoding="utf-8")):
        point = losses.get((row["method"], row["setting"]))
        if point is not None:
            setting = (
                point.setting if point.setting == row["setting"] else f"{point.setting}, timed as {row['setting']}"
            )
            found[row["activations"]][row["method"]].append(Point(setting, float(row["ms"]), point.loss, point.seeds))
    return found


@dataclass(frozen=True)
class Panel:
    """One model, its axes logarithmic."""

    title: str
    left: float
    top: float
    width: float
    axis: tuple[tuple[float, float], Sequence[float], str]
    unit: str
    lines: Sequence[tuple[str, Sequence[Point], bool]]  # method, points above `LEAST_LOSS`, whether broken

    @cached_property
    def losses(self) -> tuple[float, float]:
        found = [point.loss for _, points, _ in self.lines for point in points]
        return min(found) * 0.8, max(found) * 1.25

    def x(self, at: float) -> float:
        (low, high), _, _ = self.axis
        return self.left + self.width * math.log(at / low) / math.log(high / low)

    def y(self, loss: float) -> float:
        low, high = self.losses
        return self.top + HEIGHT * math.log(high / loss) / math.log(high / low)

    def svg(self) -> Iterator[str]:
        ends, ticks, label = self.axis
        left, right, bottom = self.x(ends[0]), self.x(ends[1]), self.top + HEIGHT
        yield f'<text x="{left}" y="{self.top - 8}" font-weight="600">{self.title}</text>'
        yield f'<rect x="{left}" y="{self.top}" width="{self.width}" height="{HEIGHT}" fill="none" stroke="#8c959f"/>'
        for tick in ticks:
            yield f'<path d="M{self.x(tick):.1f} {self.top}V{bottom}" stroke="#d0d7de" stroke-width="0.5"/>'
            yield f'<text x="{self.x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick}</text>'
        low, high = self.losses
        for loss in (n * 10**e for e in (-3, -2, -1, 0) for n in (1, 2, 5)):
            if low < loss < high:
                y = self.y(loss)
                yield f'<path d="M{left} {y:.1f}H{right}" stroke="#d0d7de" stroke-width="0.5"/>'
                yield f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>'
        yield f'<text x="{(left + right) / 2}" y="{bottom + 33}" text-anchor="middle">{label}</text>'
        for method, points, broken in self.lines:
            yield from self._line(method, points, broken)

    def _line(self, method: str, points: Sequence[Point], broken: bool) -> Iterator[str]:
        name, colour = LINES[method]
        line = [point for point in points if MATCHED not in point.setting]  # a matched mask is a point of its own
        path = " ".join(f"{self.x(point.at):.1f},{self.y(point.loss):.1f}" for point in line)
        thick, dashes = 2.4 if method == OURS else 1.2, ' stroke-dasharray="6 4"' if broken else ""
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick}"{dashes}/>'
        for point in points:
            told = f"{name} {point.setting}: {point.at:.2f} {self.unit}, {point.loss:.4f}"
            filled = colour if point in line else "#ffffff"
            at = f'cx="{self.x(point.at):.1f}" cy="{self.y(point.loss):.1f}"'
            yield f'<circle {at} r="3" fill="{filled}" stroke="{colour}"><title>{told}</title></circle>'


def panels(table: Table) -> Iterator[Panel]:
    def lines(methods: Mapping[str, Sequence[Point]], broken: bool = False) -> list[tuple[str, list[Point], bool]]:
        return [(m, [p for p in methods.get(m, ()) if p.loss > LEAST_LOSS], broken) for m in LINES if m in methods]

    models, apart = [model for model in TITLES if model in table], WIDTH + LEFT + GAP / 2
    for number, model in enumerate(models):
        yield Panel(TITLES[model], LEFT + number * apart, TOP, WIDTH, BITS, "bits", lines(table[model]))
    times = timed(table)
    both = [*lines(times["bf16"]), *lines(times["8 bits"], broken=True)]
    whole = WIDTH + (len(models) - 1) * apart
    yield Panel(f"{TITLES[TIMED]}, by time on a CPU", LEFT, TOP + BELOW, whole, TIMES, "ms", both)


def figure(table: Table) -> str:
    drawn = list(panels(table))
    width, height = drawn[-1].left + drawn[-1].width + GAP / 2, drawn[-1].top + HEIGHT + 44
    middle = height / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width:g}" height="{height}" fill="#ffffff"/>',
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        "log(perplexity / dense)</text>",
    ]
    for number, (name, colour) in enumerate(LINES.values()):
        x = LEFT + number * 125
        parts.append(
            f'<path d="M{x} 18h18" stroke="{colour}" stroke-width="2.4"/><text x="{x + 22}" y="22">{name}</text>'
        )
    parts += [part for panel in drawn for part in panel.svg()]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    table = read()
    FIGURE.write_text(figure(table), encoding="utf-8")
    for line in savings(table):
        print(line)


if __name__ == "__main__":
    main()
