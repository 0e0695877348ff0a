"""A pruned model beside the one it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmsparse.evaluation.perplexity import Perplexity


@dataclass(frozen=True)
class Comparison:
    """Two perplexities on the same text, in windows of the same length; the ratio is what pruning cost."""

    model: Perplexity
    baseline: Perplexity

    @property
    def ratio(self) -> float:
        return self.model.perplexity / self.baseline.perplexity

    def to_json(self) -> dict[str, Any]:
        return {**self.model.to_json(), "baseline": self.baseline.to_json(), "ratio": self.ratio}

    def table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table("model", "perplexity", "ratio", "tokens", "seconds", box=None, pad_edge=False)
        for one, ratio in ((self.baseline, 1.0), (self.model, self.ratio)):
            figures = (f"{one.perplexity:.4g}", f"{ratio:.3f}", f"{one.tokens:,}", f"{one.seconds:.1f}")
            table.add_row(Text(one.model), *figures)
        protocol = {key: value for key, value in self.model.protocol.items() if value is not None}
        table.caption = Text(", ".join(f"{key} {value}" for key, value in protocol.items()))
        table.caption_justify = "left"
        return table
