"""What shrinking did: what every reduction says, parameters, perplexities. As JSON, as a table, as a model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmsparse.runs.report import (
    SCHEMA_VERSION,
    RunReport,
    card_metadata,
    loss_warning,
    perplexity_lines,
    spell_protocol,
)
from llmsparse.shrinking.block import BlockRecord
from llmsparse.shrinking.reduction import Reduction, Rows


@dataclass(kw_only=True)
class ShrinkReport(RunReport):
    """The outcome of `shrink`; its `protocol` is that of the calibration windows."""

    parameters: tuple[int, int]  # of the source, and of what was made
    reductions: Sequence[Reduction]
    blocks: list[BlockRecord] = field(default_factory=list[BlockRecord])
    perplexity: dict[str, Any] | None = None  # {"before", "after", …} on held-out windows

    @property
    def share(self) -> float:
        """Of the parameters that is left."""
        return self.parameters[1] / self.parameters[0]

    def rows(self, reduction: Reduction) -> Rows:
        """What a reduction said of each block that it cut."""
        return [(block.name, block.rows[reduction.name]) for block in self.blocks if reduction.name in block.rows]

    def stored(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "output": self.output,
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "shrunk": {reduction.name: reduction.describe() for reduction in self.reductions},
            "perplexity": self.perplexity,
            "calibration": self.protocol,
            "blocks": [{"name": block.name} | block.rows for block in self.blocks],
            "logits": [{"block": block.name, **block.logits} for block in self.blocks if block.logits],
            "matching": [{"block": block.name, **block.match} for block in self.blocks if block.match],
            "warnings": self.warnings,
            "recipe": self.recipe,
            "versions": self.versions,
            "timings": {
                "seconds": self.seconds,
                "peak_memory_bytes": self.peak_memory_bytes,
                "blocks": {block.name: block.seconds for block in self.blocks},
            },
        }

    def findings(self) -> list[tuple[str, str]]:
        lines = [("parameters", f"{self.parameters[0]:,} → {self.parameters[1]:,}, {self.share:.1%} of them")]
        for reduction in self.reductions:
            lines += reduction.findings(self.rows(reduction))
        matches = [block.match for block in self.blocks if block.match]
        if matches:
            before = sum(match["before"] for match in matches) / len(matches)
            after = sum(match["after"] for match in matches) / len(matches)
            steps = matches[0]["steps"]
            lines.append(("matching", f"{steps} steps a block, mean error of the output {before:.4f} → {after:.4f}"))
        for fit in (block.logits for block in self.blocks if block.logits):
            text = f"{fit['before']:.4f} → {fit['after']:.4f} nats from the source's, by {fit['projection']}"
            lines.append(("logits", text))
        if self.perplexity:
            lines += perplexity_lines(self.perplexity)
        return lines

    def warn(self) -> None:
        for reduction in self.reductions:
            self.warnings += reduction.warnings(self.rows(reduction))
        if "note" in self.protocol:
            self.warnings.append(f"calibration: {self.protocol['note']}")
        advice = (
            f" with {self.share:.0%} of the parameters left; take out less, use --match-steps 300 or more calibration text, or "
            "tune the result before using it"
        )
        self.warnings += loss_warning(self.perplexity, "the smaller model", advice)

    def card(self) -> str:
        """The model card, README.md of the output folder."""
        what = ", ".join(reduction.describe() for reduction in self.reductions)
        lines = [
            f"---\n{card_metadata(('llmsparse', 'pruned', 'shrunk'), self.model, self.pipeline_tag)}---",
            "",
            f"# {self.model}, {self.share:.0%} of its parameters",
            "",
            f"Made with llmsparse: {what}. An ordinary, smaller checkpoint of the same kind: it loads wherever the original",
            "does, and is faster there.",
            "",
            *self.card_table(calibration=spell_protocol(self.protocol)),
            "",
            "The resolved recipe is in `llmsparse_recipe.yaml`, a row for every block in `llmsparse_report.json`.",
            "",
        ]
        return "\n".join(lines)
