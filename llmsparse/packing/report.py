"""What packing saves: bytes packed and bytes dense, weight by weight and in total. As JSON, as a table, as a card."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

MADE = {
    False: "Made with `llmsparse pack`: the pruned weights are stored without their zeros.",
    True: "Made with llmsparse: weights are stored as small integers, many of them 0, and a step a row.",
}
WIDE = 512  # inputs from which on the offset of a row, and its mask's last byte, weigh next to nothing
NARROW = (
    f"rows of fewer than {WIDE} inputs save less: a row of n inputs takes (1 − sparsity)·n values, ⌈n/8⌉ bytes of mask "
    "and, if unstructured, 4 bytes of offset"
)


@dataclass(frozen=True)
class PackedSize:
    """One weight that could be packed."""

    name: str  # as in the module, without `.weight`
    shape: tuple[int, ...]  # (out, in), or (experts, out, in)
    dtype: str
    pattern: str  # unstructured, or N:M
    sparsity: float  # fraction of places that are not kept
    bytes: int  # packed
    dense_bytes: int
    negative_zeros: int = 0  # places that hold -0.0, which are kept
    bits: float | None = None  # a weight, of one that is stored as small integers

    @property
    def pays(self) -> bool:
        return self.bytes < self.dense_bytes


@dataclass(frozen=True)
class Packing:
    """The outcome of `pack`. Totals without `packed_` count all tensors of the checkpoint."""

    model: str
    output: str
    weights: list[PackedSize]  # packed
    left_dense: list[PackedSize]  # they would be larger
    bytes: int
    dense_bytes: int
    drops_negative_zeros: bool = False

    @property
    def packed_bytes(self) -> int:
        return sum(weight.bytes for weight in self.weights)

    @property
    def packed_dense_bytes(self) -> int:
        """What the packed weights took before."""
        return sum(weight.dense_bytes for weight in self.weights)

    @property
    def coded(self) -> bool:
        """Weights are stored as small integers, and do not come back as they were."""
        return any(weight.bits is not None for weight in self.weights)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "output": self.output,
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
            "packed_bytes": self.packed_bytes,
            "packed_dense_bytes": self.packed_dense_bytes,
            "packed_ratio": self.packed_bytes / self.packed_dense_bytes,
            "weights": [asdict(weight) for weight in self.weights],
            "left_dense": [asdict(weight) for weight in self.left_dense],
        }

    def summary(self) -> list[tuple[str, str]]:
        """What a person wants to know, as (label, text) pairs."""
        patterns = ", ".join(sorted({weight.pattern for weight in self.weights}))
        numel = sum(prod(weight.shape) for weight in self.weights)
        how = f"{8 * self.packed_bytes / numel:.3f} bits each, all counted" if self.coded else patterns
        lines = [
            ("packed", f"{len(self.weights)} weights, {how}"),
            ("these weights", compared(self.packed_bytes, self.packed_dense_bytes)),
            ("whole checkpoint", compared(self.bytes, self.dense_bytes)),
        ]
        if self.left_dense:
            names = ", ".join(weight.name for weight in self.left_dense[:3])
            more = f" and {len(self.left_dense) - 3} more" if len(self.left_dense) > 3 else ""
            lines.append(("left dense", f"{names}{more}: packed they would be larger"))
        measured = self.weights if self.drops_negative_zeros else [*self.weights, *self.left_dense]
        negative = sum(weight.negative_zeros for weight in measured)
        if negative:
            kept = "hold -0.0 and are stored as values, since every bit comes back; --drop-negative-zeros gives that up"
            became = "held -0.0 and hold 0.0 now; all else comes back bit for bit"
            lines.append(("negative zeros", f"{negative:,} places {became if self.drops_negative_zeros else kept}"))
        if not self.coded and any(weight.shape[-1] < WIDE for weight in self.weights):
            lines.append(("narrow rows", NARROW))
        return lines

    def _faithful(self) -> str:
        if self.coded:
            return "its weights as they are computed with"
        return "with 0.0 for -0.0 but else bit for bit" if self.drops_negative_zeros else "bit for bit"

    def table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        for label, text in [("output", self.output), *self.summary()]:
            table.add_row(Text(label, style="bold"), Text(text))
        return table

    def card(self, source_card: str) -> str:
        """The model card of the packed folder, before that of its source, whose metadata it takes over."""
        metadata, body = split_card(source_card)
        metadata = (
            metadata or "library_name: transformers\npipeline_tag: text-generation\ntags:\n- llmsparse\n- sparse\n"
        )
        lines = [
            f"---\n{metadata}---",
            "",
            f"# {self.model}, {'quantized' if self.coded else 'packed'}",
            "",
            f"{MADE[self.coded]} Loading it takes llmsparse:",
            "`import llmsparse`, then transformers as usual; or `llmsparse run -- PROGRAM` for a program that loads it by name.",
            "Software that does not know the format refuses to load it.",
            f"`llmsparse unpack` gives the dense checkpoint back, {self._faithful()}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {label} | {text} |" for label, text in self.summary()),
            "",
        ]
        if body.strip():
            whose = "The run that made it:" if self.coded else "The dense checkpoint describes itself so:"
            lines += [whose, "", body.strip(), ""]
        return "\n".join(lines)


def compared(packed: int, dense: int) -> str:
    """ "12.3 MB, dense 33.4 MB, ratio 0.368"."""
    return f"{packed / 1e6:,.2f} MB, dense {dense / 1e6:,.2f} MB, ratio {packed / max(1, dense):.3f}"


def split_card(card: str) -> tuple[str, str]:
    """The YAML at the head of a card, and the rest."""
    lines = card.splitlines(keepends=True)
    if not lines or lines[0].strip() != "---":
        return "", card
    end = next((number for number, line in enumerate(lines[1:], 1) if line.strip() == "---"), 0)
    return ("".join(lines[1:end]), "".join(lines[end + 1 :])) if end else ("", card)
