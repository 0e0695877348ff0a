"""What a tuning did: losses as they fell, perplexities, who runs. As JSON, as a table, as a model card."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

from llmsparse.packing.report import split_card
from llmsparse.runs.report import SCHEMA_VERSION, RunReport, card_metadata, spell_protocol

if TYPE_CHECKING:
    from pathlib import Path

    from llmsparse.tuning.plan import TunePlan
    from llmsparse.tuning.training import History

REPORT, CARD = "llmsparse_report.json", "README.md"


@dataclass(kw_only=True)
class TuneReport(RunReport):
    """The outcome of `tune`; what the factorized folder said of itself stands in it as `made_from`."""

    teacher: str
    container: str
    source_report: dict[str, Any]  # of the folder that was tuned
    source_card: str
    losses: list[dict[str, float]]  # mean of each stretch of steps: its last step, every term, and `loss`
    tokens_per_second: float
    perplexity: dict[str, float] = field(default_factory=dict[str, float])  # teacher, before, after: held-out windows
    held_out: dict[str, int] = field(default_factory=dict[str, int])  # windows, seq_len
    loads: list[list[float]] = field(default_factory=list[list[float]])  # share of the tokens of each routed expert
    blocks: list[str] = field(default_factory=list[str])  # that `loads` is of

    @classmethod
    def of(cls, plan: TunePlan, history: History) -> Self:
        """All that is known before the result is measured."""
        tokens = plan.recipe.steps * plan.batch_size * plan.seq_len
        return cls(
            model=plan.name,
            teacher=plan.recipe.teacher,
            output=str(plan.output),
            container=plan.container.name,
            recipe=plan.resolved.resolved(),
            protocol=plan.protocol,
            versions=plan.versions,
            source_report=_read_report(plan.folder / REPORT),
            source_card=_read(plan.folder / CARD),
            losses=history.losses,
            tokens_per_second=tokens / history.seconds,
            held_out={"windows": len(plan.windows.held_out), "seq_len": plan.seq_len},
            blocks=[plan.model.block_names[number] for number in plan.mixtures],
        )

    @property
    def ratio(self) -> float:
        """Perplexity after tuning over that of the teacher."""
        return self.perplexity["after"] / self.perplexity["teacher"]

    @property
    def dead(self) -> int:
        """Routed experts that ran for no held-out token."""
        return sum(share == 0 for load in self.loads for share in load)

    @property
    def entropy(self) -> float:
        """Mean over blocks of the entropy of the load, from 0 (always the same experts) to 1 (all alike)."""
        return sum(map(load_entropy, self.loads)) / len(self.loads)

    def stored(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "teacher": self.teacher,
            "output": self.output,
            "container": self.container,
            "perplexity": self.perplexity | self.held_out | {"ratio": self.ratio},
            "losses": self.losses,
            "blocks": [
                {"name": name, "load": load, "entropy": load_entropy(load), "dead": load.count(0)}
                for name, load in zip(self.blocks, self.loads, strict=True)
            ],
            "text": self.protocol,
            "warnings": self.warnings,
            "recipe": self.recipe,
            "versions": self.versions,
            "timings": {
                "seconds": self.seconds,
                "tokens_per_second": self.tokens_per_second,
                "peak_memory_bytes": self.peak_memory_bytes,
            },
            "made_from": self.source_report,
        }

    def findings(self) -> list[tuple[str, str]]:
        first, last, perplexity = self.losses[0], self.losses[-1], self.perplexity
        terms = [name for name in last if name not in ("step", "loss")]
        return [
            ("trained", f"{self.recipe['train']}, {last['step']} steps of {self.protocol['batch_size']} windows"),
            (
                "perplexity",
                f"{perplexity['before']:.4g} → {perplexity['after']:.4g}, its teacher {perplexity['teacher']:.4g} (ratio "
                f"{self.ratio:.3f}), on {self.held_out['windows']} held-out windows of {self.held_out['seq_len']} tokens, "
                "per token",
            ),
            ("loss", ", ".join(f"{name} {first[name]:.4g} → {last[name]:.4g}" for name in terms)),
            ("load", f"entropy {self.entropy:.3f} of 1, {self.dead} dead experts"),
        ]

    def took(self) -> str:
        return f"{super().took()}, {self.tokens_per_second:,.0f} tokens/s in training"

    def warn(self) -> None:
        """Say plainly what a user should know: a result that is no better, experts that never run."""
        before, after = self.perplexity["before"], self.perplexity["after"]
        if not after < before:
            self.warnings.append(
                f"perplexity rose from {before:.4g} to {after:.4g}; use a lower --learning-rate, more --steps or more text"
            )
        if self.dead:
            self.warnings.append(f"{self.dead} routed experts ran for no held-out token; raise --balance-weight")

    def card(self) -> str:
        """The model card, before that of the folder that was tuned, whose metadata it takes over."""
        metadata, body = split_card(self.source_card)
        metadata = metadata or card_metadata(("llmsparse", "moe", "mixture-of-experts", self.container))
        lines = [
            f"---\n{metadata}---",
            "",
            f"# {self.model}, tuned to its dense teacher",
            "",
            f"Made with `llmsparse tune`. An ordinary {self.container} checkpoint: it loads in transformers with",
            "nothing else installed.",
            "",
            *self.card_table(teacher=self.teacher, text=spell_protocol(self.protocol)),
            "",
            "The resolved recipe is in `llmsparse_recipe.yaml`, losses and loads in `llmsparse_report.json`.",
            "",
        ]
        if body.strip():
            lines += ["Before tuning it described itself so:", "", body.strip(), ""]
        return "\n".join(lines)


def load_entropy(load: list[float]) -> float:
    """Of the shares of routed experts, from 0 (always the same) to 1 (all alike)."""
    shares = [share / sum(load) for share in load if share > 0]
    most = math.log(len(load))
    return -sum(share * math.log(share) for share in shares) / most if most else 1.0


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _read_report(file: Path) -> dict[str, Any]:
    """What a report that this program wrote holds; nothing where there is none, or another's."""
    try:
        report: Any = json.loads(_read(file) or "{}")
    except ValueError:
        return {}
    return cast(dict[str, Any], report) if isinstance(report, dict) else {}
