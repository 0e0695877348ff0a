"""What a run did: a row for every weight, totals, perplexities. As JSON, as a table, as a model card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from llmsparse.pruners import PRUNERS
from llmsparse.pruning.allocation.allocated import Allocated
from llmsparse.pruning.permutation.permuted import Permuted, spell_permuted, unfolded
from llmsparse.runs.report import (
    SCHEMA_VERSION,
    RunReport,
    card_metadata,
    loss_warning,
    perplexity_lines,
    spell_protocol,
)
from llmsparse.sparsity.stats import Gram

if TYPE_CHECKING:
    from llmsparse.packing.report import Packing


@dataclass(frozen=True)
class PrunedWeight:
    """One pruned weight."""

    name: str
    shape: tuple[int, int]  # (out, in)
    method: str
    pattern: str
    sparsity_asked: float
    sparsity: float  # fraction of zeros as written
    error: float | None  # ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on a sample of calibration rows, as the method left it; None: no rows
    tokens: int  # calibration rows its input was seen with
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def _solved_from_few(row: PrunedWeight) -> bool:
    """Whether a Hessian of fewer tokens than inputs decided."""
    return PRUNERS[row.method]().needs is Gram and 0 < row.tokens < row.shape[1]


def _mean(matches: list[dict[str, Any]], of: str, what: str) -> float:
    """Of the blocks whose loss is that of the output, or of the logits."""
    found = [match[what] for match in matches if match["of"] == of]
    return sum(found) / max(len(found), 1)


@dataclass(frozen=True)
class BlockRecord:
    """What the journal keeps of a finished block."""

    name: str
    rows: list[PrunedWeight]
    match: dict[str, Any] | None  # relative output error before and after block matching
    seconds: dict[str, float]  # by name: for each weight of the block, and for the block as a whole
    permuted: list[Permuted] = field(default_factory=list[Permuted])  # matrices whose inputs might be reordered

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> BlockRecord:
        rows = [PrunedWeight(**(row | {"shape": tuple(row["shape"])})) for row in entry["rows"]]
        permuted = [Permuted(**row) for row in entry["permuted"]]
        return cls(entry["name"], rows, entry["match"], entry["seconds"], permuted)


@dataclass(kw_only=True)
class PruneReport(RunReport):
    """The outcome of `prune`; its `protocol` is that of the calibration windows."""

    blocks: list[BlockRecord] = field(default_factory=list[BlockRecord])
    perplexity: dict[str, Any] | None = None  # {"before", "after", "windows", "seq_len", "tokens"}, of held-out text
    allocated: Allocated | None = None
    packing: Packing | None = None  # what the packed format saved
    total_parameters: int = 0

    @property
    def rows(self) -> list[PrunedWeight]:
        return [row for block in self.blocks for row in block.rows]

    @property
    def permuted(self) -> list[Permuted]:
        return [row for block in self.blocks for row in block.permuted]

    @property
    def sparsity(self) -> float:
        """Zeros over elements of the pruned weights."""
        return self.zeros / sum(row.numel for row in self.rows)

    @property
    def zeros(self) -> int:
        return sum(round(row.sparsity * row.numel) for row in self.rows)

    @property
    def matched(self) -> bool:
        return any(block.match for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | ({"packing": self.packing.to_json()} if self.packing else {})

    def stored(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "output": self.output,
            "sparsity": self.sparsity,
            "sparsity_of_all_parameters": self.zeros / self.total_parameters,
            "perplexity": self.perplexity,
            "calibration": self.protocol,
            **({"allocation": self.allocated.to_json()} if self.allocated else {}),
            **({"permuted": [asdict(row) for row in self.permuted]} if self.permuted else {}),
            "weights": [asdict(row) for row in self.rows],
            "matching": [{"block": block.name, **block.match} for block in self.blocks if block.match],
            "warnings": self.warnings,
            "recipe": self.recipe,
            "versions": self.versions,
            "timings": {
                "seconds": self.seconds,
                "peak_memory_bytes": self.peak_memory_bytes,
                "weights": {name: seconds for block in self.blocks for name, seconds in block.seconds.items()},
            },
        }

    def findings(self) -> list[tuple[str, str]]:
        lines = [
            ("pruned", f"{len(self.rows)} weights, {sum(row.numel for row in self.rows):,} parameters"),
            ("sparsity", f"{self.sparsity:.4f} of these, {self.zeros / self.total_parameters:.4f} of all parameters"),
            *([("allocation", self.allocated.spell())] if self.allocated else []),
            *([("permuted", spell_permuted(self.permuted))] if self.permuted else []),
            ("matching", self._matching()),
        ]
        if self.perplexity:
            lines += perplexity_lines(self.perplexity)
        return lines + (self.packing.summary() if self.packing else [])

    def _matching(self) -> str:
        matches = [block.match for block in self.blocks if block.match]
        if not matches:
            return "off"
        kind = "validation" if matches[0]["validation"] else "training (one batch: none for validation)"
        means = f"{_mean(matches, 'output', 'before'):.4f} → {_mean(matches, 'output', 'after'):.4f}"
        last = [match for match in matches if match["of"] == "logits"]
        spelled = f"mean {kind} error of the output {means}" if len(last) < len(matches) else f"{kind} error"
        nats = [f"of the logits {match['before']:.4f} → {match['after']:.4f} nats" for match in last]
        return ", ".join([f"{matches[0]['steps']} steps a block", spelled, *nats])

    def warn(self) -> None:
        """Say plainly what a user should know: weights that fell back, text that ran short, a large loss."""
        self.warnings += [
            *self._starved(),
            *self._unsettled(),
            *self._unmatched(),
            *self._sparse_before(),
            *unfolded(self.permuted),
        ]
        if "note" in self.protocol:
            self.warnings.append(f"calibration: {self.protocol['note']}")
        self.warnings += loss_warning(self.perplexity, "the pruned model", self._advice())

    def _advice(self) -> str:
        """How to lose less."""
        hints = [self._milder()]
        if {row.method for row in self.rows} != {"alps"}:
            hints.append("--method alps")
        if not self.matched:
            hints.append("--match-steps 300")
        return (
            f"; this model may be of little use at {self.sparsity:.0%} sparsity: try {', or '.join(hints)}, or more "
            "calibration text"
        )

    def _starved(self) -> Iterator[str]:
        """Experts that fell back to another method, and weights that a Hessian of few tokens was solved for."""
        fallen = [row for row in self.rows if "fallback" in row.notes]
        if fallen:
            unseen = sum(row.tokens == 0 for row in fallen)
            methods = " or ".join(sorted({row.notes["fallback"].partition(":")[0] for row in fallen}))
            none = f", {unseen} of them none at all" if unseen else ""
            yield (
                f"{len(fallen)} weights of experts saw too few calibration tokens{none}, and were pruned by {methods}, "
                f"{fallen[0].name} first; use more --calibration-samples"
            )
        short = [row for row in self.rows if row not in fallen and _solved_from_few(row)]
        if short:
            yield (
                f"{len(short)} weights have more inputs than calibration has tokens, {short[0].name} first "
                f"({short[0].shape[1]} inputs, {short[0].tokens} tokens); use more --calibration-samples, or --method wanda"
            )

    def _unsettled(self) -> Iterator[str]:
        """Weights whose method came to the end of its iterations before its mask stood still."""
        rows = [row for row in self.rows if row.notes.get("settled") is False]
        if rows:
            yield (
                f"the masks of {len(rows)} weights had not settled after {rows[0].notes['iterations']} iterations, "
                f"{rows[0].name} first; give the method more max_iterations"
            )

    def _unmatched(self) -> Iterator[str]:
        """Blocks that matching left as they were."""
        matches = [(block.name, block.match) for block in self.blocks if block.match]
        stuck = [name for name, match in matches if not match["improved"]]
        if stuck:
            yield (
                f"matching improved {len(matches) - len(stuck)} of {len(matches)} blocks; the others, {stuck[0]} first, "
                "stay as they were pruned"
            )

    def _sparse_before(self) -> Iterator[str]:
        """Zeros of the source that did not stay."""
        sparse = [row for row in self.rows if "zeros_before" in row.notes]
        returned = sum(row.notes["zeros_returned"] for row in sparse)
        if returned:
            zeros = sum(round(row.notes["zeros_before"] * row.numel) for row in sparse)
            yield (
                f"the model was sparse already, and {returned:,} of the {zeros:,} zeros in its pruned weights are other than "
                "0 now; --keep-zeros leaves them at 0"
            )

    def _milder(self) -> str:
        """How to lose less: an N:M pattern has the sparsity it has, but the same one may bind less."""
        patterns = {row.pattern for row in self.rows}
        if not any(":" in pattern for pattern in patterns):
            return "a lower --sparsity"
        return f"a looser --pattern such as {'4:8 or ' if patterns == {'2:4'} else ''}unstructured"

    def card(self) -> str:
        """The model card, README.md of the output folder."""
        method = self.rows[0].method
        lines = [
            f"---\n{card_metadata(('llmsparse', 'sparse', 'pruned', method), self.model, self.pipeline_tag)}---",
            "",
            f"# {self.model}, pruned to {self.sparsity:.0%} with {method}",
            "",
            "Made with llmsparse. An ordinary checkpoint whose pruned weights hold zeros: it loads wherever the original does,",
            "and takes the same space and time until it is packed.",
            "",
            *self.card_table(calibration=spell_protocol(self.protocol)),
            "",
            "The resolved recipe is in `llmsparse_recipe.yaml`, a row for every weight in `llmsparse_report.json`.",
            "",
        ]
        return "\n".join(lines)
