"""What an allocation came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmsparse.sparsity.patterns import Pattern


@dataclass(frozen=True)
class Allocated:
    """What every unit got: `units` name → sparsity; `patterns` weight name → pattern."""

    units: dict[str, float]
    patterns: dict[str, Pattern]
    loss: dict[str, float]  # of a search: that of uniform and of what was found, in nats a token

    def to_json(self) -> dict[str, Any]:
        return {"units": self.units} | ({"loss": self.loss} if self.loss else {})

    def spell(self) -> str:
        """One line for a summary."""
        least, most = min(self.units.values()), max(self.units.values())
        searched = f", loss {self.loss['uniform']:.4f} → {self.loss['found']:.4f} by its scores" if self.loss else ""
        return f"{len(self.units)} units from {least:.3f} to {most:.3f}{searched}"
