"""What a factorization did: a row for every block, totals, perplexities. As JSON, as a table, as a model card."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from llmsparse.factorization.block import LayerRecord
from llmsparse.runs.report import (
    SCHEMA_VERSION,
    RunReport,
    card_metadata,
    loss_warning,
    perplexity_lines,
    spell_protocol,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

PRUNED = 0.05  # fraction of zeros that no dense model has by chance
WASTE = 1.1  # neurons that run, padding included, over those asked for: worth a warning


@dataclass(kw_only=True)
class FactorizeReport(RunReport):
    """The outcome of `factorize`; its `protocol` is that of the calibration windows."""

    layout: dict[str, Any]  # numbers of experts, their width, the share of the neurons that runs
    experts: str  # the same in words
    container: str
    blocks: list[LayerRecord] = field(default_factory=list[LayerRecord])
    perplexity: dict[str, Any] | None = None  # {"before", "after", …} on held-out windows

    @property
    def active_share(self) -> float:
        """Neurons that run for a token, padding included, over those of the dense FFN."""
        return self.layout["active_share"]

    def mean(self, energy: str) -> float:
        """Of `captured`, `unfitted`, `oracle` or `entropy` over the blocks."""
        return sum(getattr(block.routing, energy) for block in self.blocks) / len(self.blocks)

    def stored(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "output": self.output,
            "container": self.container,
            "layout": self.layout,
            "perplexity": self.perplexity,
            "calibration": self.protocol,
            "blocks": [
                {"name": block.name, "measured_on": block.measured_on}
                | asdict(block.routing)
                | {"entropy": block.routing.entropy, "dead": block.routing.dead}
                | block.notes
                for block in self.blocks
            ],
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
        where = self.blocks[0].measured_on
        dead = sum(block.routing.dead for block in self.blocks)
        lines = [
            ("experts", self.experts),
            ("container", self.container),
            (
                "output energy",
                f"{self.mean('captured'):.3f} captured, {self.mean('unfitted'):.3f} before scale and refit; "
                f"a greedy oracle's choice {self.mean('oracle'):.3f} ({where} tokens, mean of {len(self.blocks)} blocks)",
            ),
            ("load", f"entropy {self.mean('entropy'):.3f} of 1, {dead} dead experts"),
        ]
        if self.perplexity:
            lines += perplexity_lines(self.perplexity)
        return lines

    def table(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        rows = Table("block", "captured", "unfitted", "oracle", "entropy", "dead", box=None, pad_edge=False)
        for block in self.blocks:
            routing = block.routing
            figures = (routing.captured, routing.unfitted, routing.oracle, routing.entropy)
            rows.add_row(block.name, *(f"{figure:.4f}" for figure in figures), str(routing.dead))
        return Group(rows, super().table())

    def warn(self) -> None:
        """Say plainly what a user should know: padding, dead experts, text that ran short, a large loss."""
        asked = (self.layout["shared"] + self.layout["active"]) / self.layout["experts"]
        if self.active_share > WASTE * asked:
            self.warnings.append(
                f"experts are padded to {self.layout['width']} neurons, so {self.active_share:.0%} of the FFN runs where "
                f"{asked:.0%} was asked for; a number of experts that divides the FFN into such widths wastes less"
            )
        zeros = sum(block.notes["zeros_before"] for block in self.blocks) / len(self.blocks)
        if zeros > PRUNED:
            self.warnings.append(
                f"the dense FFNs were pruned, {zeros:.0%} of them 0, and refit and padding do not keep that; factorize "
                "the model as it was before pruning, then prune the result"
            )
        dead = [block.name for block in self.blocks if block.routing.dead]
        if dead:
            self.warnings.append(f"{len(dead)} blocks have experts that no {self.blocks[0].measured_on} token chose")
        if "note" in self.protocol:
            self.warnings.append(f"calibration: {self.protocol['note']}")
        advice = (
            f" with {self.active_share:.0%} of the FFN active; use more active experts, more calibration text, or tune the "
            "result before using it"
        )
        self.warnings += loss_warning(self.perplexity, "the factorized model", advice)

    def card(self) -> str:
        """The model card, README.md of the output folder."""
        lines = [
            f"---\n{card_metadata(('llmsparse', 'moe', 'mixture-of-experts', self.container), self.model, self.pipeline_tag)}---",
            "",
            f"# {self.model} as a mixture of experts, {self.active_share:.0%} of its FFN active",
            "",
            f"Made with llmsparse from the dense model, without training it. An ordinary {self.container} checkpoint: it",
            "loads in transformers with nothing else installed.",
            "",
            *self.card_table(calibration=spell_protocol(self.protocol)),
            "",
            "| block | output energy captured | before scale and refit | greedy oracle | load entropy | dead experts |",
            "|---|---|---|---|---|---|",
            *(
                f"| {block.name} | {routing.captured:.4f} | {routing.unfitted:.4f} | {routing.oracle:.4f} "
                f"| {routing.entropy:.4f} | {routing.dead} |"
                for block in self.blocks
                for routing in (block.routing,)
            ),
            "",
            "The resolved recipe is in `llmsparse_recipe.yaml`, the load of every expert in `llmsparse_report.json`.",
            "",
        ]
        return "\n".join(lines)
