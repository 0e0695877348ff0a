"""What is left out: for every layer its share and threshold, for every block the error. As JSON, as a table, as a model card."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from llmsparse.cutting.block import CutBlock, CutLayer
from llmsparse.models.thresholds import Thresholds
from llmsparse.runs.report import (
    SCHEMA_VERSION,
    RunReport,
    card_metadata,
    loss_warning,
    perplexity_lines,
    spell_protocol,
)


@dataclass(kw_only=True)
class ActivationsReport(RunReport):
    """The outcome of `activations`; its `protocol` is that of the calibration windows."""

    left_whole: int  # weights whose inputs all count, since they multiply in a way of their own
    blocks: list[CutBlock] = field(default_factory=list[CutBlock])
    perplexity: dict[str, Any] | None = None

    @property
    def layers(self) -> list[CutLayer]:
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def sparsity(self) -> float:
        """Share of the inputs left out, weighed by the weights that they meet."""
        sizes = [layer.met * prod(layer.shape) for layer in self.layers]
        return sum(layer.share * size for layer, size in zip(self.layers, sizes, strict=True)) / sum(sizes)

    def thresholds(self) -> Thresholds:
        return Thresholds(
            score=self.recipe["score"],
            bias=self.recipe["bias"],
            sparsity=self.recipe["sparsity"],
            layers={layer.name: layer.rule for layer in self.layers},
            means={name: mean for block in self.blocks for name, mean in block.means.items()},
        )

    def stored(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "output": self.output,
            "sparsity": self.sparsity,
            "perplexity": self.perplexity,
            "calibration": self.protocol,
            "left_whole": self.left_whole,
            "blocks": [
                {"name": block.name, "error": block.error, "layers": [asdict(layer) for layer in block.layers]}
                for block in self.blocks
            ],
            "warnings": self.warnings,
            "recipe": self.recipe,
            "versions": self.versions,
            "timings": {"seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes},
        }

    def findings(self) -> list[tuple[str, str]]:
        by_name: dict[str, list[float]] = defaultdict(list)
        for layer in self.layers:
            by_name[layer.name.rpartition(".")[2]].append(layer.share)
        shares = ", ".join(f"{name} {sum(found) / len(found):.0%}" for name, found in by_name.items())
        lines = [
            ("left out", f"{self.sparsity:.1%} of the inputs of {len(self.layers)} layers, a token: {shares}"),
            ("weights", "as they were: where these thresholds are not known, the model is the dense one"),
        ]
        return lines + (perplexity_lines(self.perplexity) if self.perplexity else [])

    def warn(self) -> None:
        if self.left_whole:
            self.warnings.append(f"{self.left_whole} weights see all of their inputs: they are no plain linear layers")
        if "note" in self.protocol:
            self.warnings.append(f"calibration: {self.protocol['note']}")
        self.warnings += loss_warning(self.perplexity, "the model", "; give it a smaller --sparsity")

    def card(self) -> str:
        """The model card, README.md of the output folder."""
        lines = [
            f"---\n{card_metadata(('llmsparse', 'sparse', 'activation-sparsity'), self.model)}---",
            "",
            *self.card_table(calibration=spell_protocol(self.protocol)),
            "",
            "Loaded through llmsparse, inputs of linear layers are left out by the thresholds in `config.json`; loaded in any",
            "other way it is the dense model.",
            "",
        ]
        return "\n".join(lines)
