"""What a quantization did: a row for every weight, bits by part, perplexities. As JSON, as a table, as a model card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from llmsparse.runs.report import (
    SCHEMA_VERSION,
    RunReport,
    card_metadata,
    loss_warning,
    perplexity_lines,
    spell_protocol,
)

if TYPE_CHECKING:
    from llmsparse.packing.report import Packing

MISSED = 0.01  # share of the bits asked for that is worth a warning


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized weight."""

    name: str
    shape: tuple[int, int]  # (out, in)
    bits: float  # stored, a weight, steps counted
    entropy: float  # of its numbers, in bits
    zeros: float  # fraction of its numbers
    step: float | None  # in root mean squares of a row; None where a largest number decided
    asked: float | None  # bits that it should take; None where a largest number decided
    group: int  # numbers that share a step
    error: float | None  # ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on a sample of calibration rows; None: no rows
    tokens: int  # calibration rows its input was seen with
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class BlockRecord:
    """What the journal keeps of a finished block."""

    name: str
    rows: list[QuantizedWeight]
    seconds: dict[str, float]  # by name: for each weight of the block, and for the block as a whole
    match: dict[str, Any] | None = None  # as of `calibration.matching.Match`

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> BlockRecord:
        rows = [QuantizedWeight(**(row | {"shape": tuple(row["shape"])})) for row in entry["rows"]]
        return cls(entry["name"], rows, entry["seconds"], entry["match"])


@dataclass(kw_only=True)
class QuantizeReport(RunReport):
    """The outcome of `quantize`; its `protocol` is that of the calibration windows."""

    blocks: list[BlockRecord] = field(default_factory=list[BlockRecord])
    perplexity: dict[str, Any] | None = None  # {"before", "after", "windows", "seq_len", "tokens"}, of held-out text
    packing: Packing | None = None

    @property
    def rows(self) -> list[QuantizedWeight]:
        return [row for block in self.blocks for row in block.rows]

    @property
    def bits(self) -> float:
        """Stored bits a weight, of the weights that `--bits` speaks of: a head with bits of its own aside."""
        return _mean(self._searched, lambda row: row.bits)

    @property
    def _searched(self) -> list[QuantizedWeight]:
        return [row for row in self.rows if row.step is not None] or self.rows

    def stored(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "output": self.output,
            "bits": self.bits,
            "entropy": _mean(self._searched, lambda row: row.entropy),
            "zeros": _mean(self._searched, lambda row: row.zeros),
            "perplexity": self.perplexity,
            "calibration": self.protocol,
            "weights": [asdict(row) for row in self.rows],
            "warnings": self.warnings,
            "recipe": self.recipe,
            "versions": self.versions,
            "timings": {
                "seconds": self.seconds,
                "peak_memory_bytes": self.peak_memory_bytes,
                "weights": {name: seconds for block in self.blocks for name, seconds in block.seconds.items()},
            },
        }

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | ({"packing": self.packing.to_json()} if self.packing else {})

    def findings(self) -> list[tuple[str, str]]:
        searched = self._searched
        code, entropy = _mean(searched, _code), _mean(searched, lambda row: row.entropy)
        zeros = _mean(searched, lambda row: row.zeros)
        lines = [
            ("quantized", f"{len(self.rows)} weights, {sum(row.numel for row in self.rows):,} parameters"),
            ("bits a weight", f"{self.bits:.3f}: {code:.3f} of numbers, {self.bits - code:.3f} of steps"),
            *self._by_bits(),
            ("numbers", f"{zeros:.1%} zeros; entropy {entropy:.3f} bits, {code - entropy:.3f} below"),
            *self._beside(),
        ]
        if self.perplexity:
            lines += perplexity_lines(self.perplexity)
        return lines + (self.packing.summary() if self.packing else [])

    def _by_bits(self) -> list[tuple[str, str]]:
        """Where rules say so: how many weights take how many bits."""
        asked = sorted({row.asked for row in self.rows if row.asked is not None})
        counts = [sum(row.asked == bits for row in self.rows) for bits in asked]
        told = ", ".join(f"{count} weights {bits:g}" for bits, count in zip(asked, counts, strict=True))
        return [("by rules", told)] if len(asked) > 1 else []

    def _beside(self) -> list[tuple[str, str]]:
        """What takes bits of its own: the head."""
        searched = {row.name for row in self._searched}
        return [(row.name, f"{row.bits:.3f} bits a weight") for row in self.rows if row.name not in searched]

    def warn(self) -> None:
        """Say plainly what a user should know: bits that were missed, weights that fell back, a large loss."""
        self.warnings += [*self._missed(), *self._starved()]
        if "note" in self.protocol:
            self.warnings.append(f"calibration: {self.protocol['note']}")
        advice = "; this model may be of little use: give it more --bits, or more calibration text"
        self.warnings += loss_warning(self.perplexity, "the quantized model", advice)

    def _missed(self) -> Iterator[str]:
        for asked in sorted({row.asked for row in self.rows if row.asked is not None}):
            rows = [row for row in self.rows if row.asked == asked]
            found = sum(row.bits * row.numel for row in rows) / sum(row.numel for row in rows)
            if abs(found - asked) > MISSED * asked:
                which = f"{rows[0].name} and {len(rows) - 1} more"
                yield f"{found:.3f} bits a weight, {asked:g} were asked for of {which}: no step comes nearer"

    def _starved(self) -> Iterator[str]:
        fallen = [row for row in self.rows if "fallback" in row.notes]
        if fallen:
            yield (
                f"{len(fallen)} weights of experts saw too few calibration tokens and were rounded to the nearest, "
                f"{fallen[0].name} first; use more --calibration-samples"
            )

    def card(self) -> str:
        """The model card, README.md of the output folder."""
        lines = [
            f"---\n{card_metadata(('llmsparse', 'sparse', 'quantized'), self.model, self.pipeline_tag)}---",
            "",
            *self.card_table(calibration=spell_protocol(self.protocol)),
            "",
            "The resolved recipe is in `llmsparse_recipe.yaml`, a row for every weight in `llmsparse_report.json`.",
            "",
        ]
        return "\n".join(lines)


def _mean(rows: Sequence[QuantizedWeight], of: Callable[[QuantizedWeight], float]) -> float:
    """Of all their numbers."""
    return sum(of(row) * row.numel for row in rows) / sum(row.numel for row in rows)


def _code(row: QuantizedWeight) -> float:
    """Bits a weight of its numbers alone."""
    return row.bits - 16 / row.group
