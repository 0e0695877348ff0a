"""What the reports of every run share: who, what and how long; a table of two columns; the frame of a model card."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA_VERSION = 1
LARGE_LOSS = 1.5  # a perplexity ratio worth a warning


@dataclass(kw_only=True)
class RunReport(ABC):
    """The outcome of a run; written as llmsparse_report.json."""

    model: str
    output: str
    recipe: dict[str, Any]
    protocol: dict[str, Any]  # of the text
    versions: dict[str, str]
    pipeline_tag: str = "text-generation"  # of the model card
    warnings: list[str] = field(default_factory=list[str])
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    @abstractmethod
    def stored(self) -> dict[str, Any]:
        """llmsparse_report.json; everything that time decides stands under `timings`."""

    @abstractmethod
    def warn(self) -> None:
        """Put into `warnings`, plainly, what a user should know; called once, when all is measured."""

    @abstractmethod
    def card(self) -> str:
        """The model card, README.md of the output folder."""

    @abstractmethod
    def findings(self) -> list[tuple[str, str]]:
        """What a person wants to know, as (label, text) pairs; output, time and warnings aside."""

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints: the stored report, and time and memory where a reader looks first."""
        return self.stored() | {"seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes}

    def took(self) -> str:
        return f"{self.seconds:.1f} s, peak memory {self.peak_memory_bytes / 1e9:.2f} GB"

    def summary(self) -> list[tuple[str, str]]:
        """All that a person wants to know, as (label, text) pairs."""
        warnings = [("warning", warning) for warning in self.warnings]
        return [("output", self.output), *self.findings(), ("took", self.took()), *warnings]

    def table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        for label, text in self.summary():
            style = "yellow" if label == "warning" else ""
            table.add_row(Text(label, style="bold " + style), Text(text, style=style))
        return table

    def card_table(self, **more: str) -> list[str]:
        """The summary as lines of Markdown, without what concerns this machine alone."""
        rows = [*self.findings(), *(("warning", warning) for warning in self.warnings), *more.items()]
        return ["| | |", "|---|---|", *(f"| {label} | {text} |" for label, text in rows)]


def perplexity_lines(perplexity: dict[str, Any]) -> list[tuple[str, str]]:
    """{"before", "after", "windows", "seq_len"} of held-out text as rows of a summary: of several texts a row for each."""
    return [
        (
            "perplexity",
            f"{found['before']:.4g} → {found['after']:.4g} on {found['windows']} held-out windows of "
            f"{found['seq_len']} tokens{' of ' + found['source'] if 'source' in found else ''}, per token",
        )
        for found in perplexity.get("sources", [perplexity])
    ]


def loss_warning(perplexity: dict[str, Any] | None, model: str, advice: str) -> list[str]:
    """What to say where perplexity rose much, or is no number, of the text that lost most; `model` as in "the pruned
    model"."""
    if not perplexity:
        return []
    worst = perplexity.get("sources", [perplexity])[0]
    before, after = worst["before"], worst["after"]
    where = f" on {worst['source']}" if "source" in worst else ""
    if not math.isfinite(after):
        return [f"perplexity{where} is NaN: the logits of {model} are no numbers; try --dtype float32"]
    return [] if after < LARGE_LOSS * before else [f"perplexity{where} rose {after / before:.1f}-fold{advice}"]


def card_metadata(tags: Sequence[str], base_model: str | None = None, pipeline_tag: str = "text-generation") -> str:
    """The YAML between the `---` lines of a model card."""
    import yaml

    base = yaml.safe_dump({"base_model": base_model}, allow_unicode=True, width=1000) if base_model else ""
    listed = "".join(f"- {tag}\n" for tag in tags)
    return f"{base}library_name: transformers\npipeline_tag: {pipeline_tag}\ntags:\n{listed}"


def spell_protocol(protocol: dict[str, Any]) -> str:
    if "sources" in protocol:
        return "; ".join(map(_spell_share, protocol["sources"]))
    return ", ".join(f"{key} {value}" for key, value in protocol.items())


def _spell_share(share: dict[str, Any]) -> str:
    """One text of a mix."""
    rest = {key: value for key, value in share.items() if key not in ("source", "weight")}
    return f"{share['source']} by {share['weight']:g} ({spell_protocol(rest)})"
