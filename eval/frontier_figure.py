"""The figure of eval/results/frontier.csv, and how many bits fewer `quantize` takes for the same perplexity.

`python -m eval.frontier_figure` writes docs/frontier.svg and prints a line for each rival's point: the bits at which `quantize`
loses as much, log(loss) being interpolated between its own points, and how many that saves. Points are means over seeds.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

RESULTS = Path(__file__).parent / "results" / "frontier.csv"
FIGURE = Path(__file__).parent.parent / "docs" / "frontier.svg"
TITLES = {"embedded": "embedded model, 7 M, code", "babyllama-tok361": "babyllama, 15 M, stories"}
OURS = "quantize"
MATCHED = " matched"  # behind a setting
LINES = {  # method → its name in the figure, and its colour
    OURS: ("llmsparse quantize", "#d1242f"),
    "gptq": ("GPTQ, groups", "#0969da"),
    "llama.cpp": ("llama.cpp + imatrix", "#8250df"),
    "rtn": ("nearest, groups", "#6e7781"),
    "mask": ("mask, bf16 values", "#1a7f37"),
    "mask-int4": ("mask, int4 values", "#9a6700"),
    "mask-int8": ("mask, int8 values", "#57606a"),
}
LEAST_LOSS = 1e-3  # less is noise of a seed
BITS = (1.6, 10.0)
TICKS = (2, 3, 4, 6, 8)
WIDTH, HEIGHT, LEFT, TOP, GAP = 440, 300, 58, 62, 36


@dataclass(frozen=True)
class Point:
    """Mean over seeds."""

    setting: str
    bits: float
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
            points.sort(key=lambda point: point.bits)
    return table


def bits_for(points: Sequence[Point], loss: float) -> float | None:
    """Where a line of points loses as much, or None where it does not reach."""
    for few, more in pairwise(points):
        if more.loss <= loss <= few.loss and more.loss > LEAST_LOSS:
            share = math.log(few.loss / loss) / math.log(few.loss / more.loss)
            return few.bits + share * (more.bits - few.bits)
    return None


def savings(table: Table) -> Iterator[str]:
    for model, methods in table.items():
        line = [point for point in methods[OURS] if MATCHED not in point.setting]
        for method in LINES:
            for point in methods.get(method, ()) if method != OURS else ():
                ours = bits_for(line, point.loss)
                if ours is not None:
                    yield (
                        f"{model:17} {method:10} {point.setting:12} {point.bits:5.2f} bits, loss {point.loss:.4f} "
                        f"({point.seeds} seeds): {ours:.2f} bits, {point.bits - ours:.2f} fewer"
                    )


class Panel:
    """One model, its axes logarithmic, its upper left corner at (LEFT + offset, TOP)."""

    def __init__(self, model: str, methods: Mapping[str, Sequence[Point]], offset: float) -> None:
        self.model, self.offset = model, offset
        self.methods = {method: [p for p in methods.get(method, ()) if p.loss > LEAST_LOSS] for method in LINES}
        losses = [point.loss for points in self.methods.values() for point in points]
        self.low, self.high = min(losses) * 0.8, max(losses) * 1.25

    def x(self, bits: float) -> float:
        return LEFT + self.offset + WIDTH * math.log(bits / BITS[0]) / math.log(BITS[1] / BITS[0])

    def y(self, loss: float) -> float:
        return TOP + HEIGHT * math.log(self.high / loss) / math.log(self.high / self.low)

    def svg(self) -> Iterator[str]:
        left, right, bottom = self.x(BITS[0]), self.x(BITS[1]), TOP + HEIGHT
        yield f'<text x="{left}" y="{TOP - 8}" font-weight="600">{TITLES[self.model]}</text>'
        yield f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#8c959f"/>'
        for bits in TICKS:
            yield f'<path d="M{self.x(bits):.1f} {TOP}V{bottom}" stroke="#d0d7de" stroke-width="0.5"/>'
            yield f'<text x="{self.x(bits):.1f}" y="{bottom + 16}" text-anchor="middle">{bits}</text>'
        for loss in (n * 10**e for e in (-3, -2, -1, 0) for n in (1, 2, 5)):
            if self.low < loss < self.high:
                y = self.y(loss)
                yield f'<path d="M{left} {y:.1f}H{right}" stroke="#d0d7de" stroke-width="0.5"/>'
                yield f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>'
        middle = (left + right) / 2
        yield f'<text x="{middle}" y="{bottom + 33}" text-anchor="middle">stored bits a weight, everything counted</text>'
        for method, points in self.methods.items():
            colour = LINES[method][1]
            # a matched mask is a point of its own, not one of the line
            line = [point for point in points if MATCHED not in point.setting]
            path = " ".join(f"{self.x(point.bits):.1f},{self.y(point.loss):.1f}" for point in line)
            thick = 2.4 if method == OURS else 1.2
            yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick}"/>'
            for point in points:
                name = f"{LINES[method][0]} {point.setting}: {point.bits:.2f} bits, {point.loss:.4f}"
                filled = colour if point in line else "#ffffff"
                at = f'cx="{self.x(point.bits):.1f}" cy="{self.y(point.loss):.1f}"'
                yield f'<circle {at} r="3" fill="{filled}" stroke="{colour}"><title>{name}</title></circle>'


def figure(table: Table) -> str:
    models = [model for model in TITLES if model in table]
    panels = [Panel(model, table[model], number * (WIDTH + LEFT + GAP / 2)) for number, model in enumerate(models)]
    width, height = LEFT + len(panels) * (WIDTH + LEFT + GAP / 2), TOP + HEIGHT + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width:g}" height="{height}" fill="#ffffff"/>',
        f'<text x="14" y="{TOP + HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {TOP + HEIGHT / 2})">'
        "log(perplexity / dense)</text>",
    ]
    for number, (name, colour) in enumerate(LINES.values()):
        x = LEFT + number * 142
        parts.append(
            f'<path d="M{x} 18h18" stroke="{colour}" stroke-width="2.4"/><text x="{x + 22}" y="22">{name}</text>'
        )
    parts += [part for panel in panels for part in panel.svg()]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    table = read()
    FIGURE.write_text(figure(table), encoding="utf-8")
    for line in savings(table):
        print(line)


if __name__ == "__main__":
    main()
