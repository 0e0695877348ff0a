"""What was measured: for every block how its experts were reached. As JSON, as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llmsparse.runs.report import SCHEMA_VERSION, RunReport, spell_protocol


@dataclass(frozen=True)
class ScoredBlock:
    """What the journal keeps of a measured block."""

    name: str
    experts: int
    unreached: dict[str, int]  # text → experts that none of its tokens was sent to
    super_experts: list[int]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> ScoredBlock:
        return cls(**{key: entry[key] for key in ("name", "experts", "unreached", "super_experts", "seconds")})


@dataclass(kw_only=True)
class ScoresReport(RunReport):
    """The outcome of `scores`; its `protocol` is that of the calibration windows."""

    texts: dict[str, float]  # name → weight
    blocks: list[ScoredBlock] = field(default_factory=list[ScoredBlock])

    def stored(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "output": self.output,
            "texts": self.texts,
            "calibration": self.protocol,
            "blocks": [
                {key: value for key, value in asdict(block).items() if key != "seconds"} for block in self.blocks
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
        counts = sorted({block.experts for block in self.blocks})
        lines = [
            ("experts", f"{' or '.join(map(str, counts))} in each of {len(self.blocks)} layers"),
            ("texts", spell_protocol(self.protocol)),
        ]
        found = [
            f"{block.name}: {', '.join(map(str, block.super_experts))}" for block in self.blocks if block.super_experts
        ]
        return lines + ([("super experts", "; ".join(found))] if found else [])

    def warn(self) -> None:
        for text in self.texts:
            idle = sum(block.unreached.get(text, block.experts) for block in self.blocks)
            if idle:
                total = sum(block.experts for block in self.blocks)
                self.warnings.append(f"{idle} of {total} experts were reached by no token of {text}")
        if "note" in self.protocol:
            self.warnings.append(f"calibration: {self.protocol['note']}")

    def card(self) -> str:
        """Nothing is written beside the file."""
        return ""
