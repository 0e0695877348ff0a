"""What runs each packed weight of a loaded model, why, and why each other backend does not; what runs the layers that stay
dense, and what its experts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from llmsparse.backends.choice import Choice
from llmsparse.inference.cut_layers import cut_layers
from llmsparse.inference.decode_attention import lean_attention
from llmsparse.inference.dense_linear import lean_linears
from llmsparse.inference.fused_experts import Fusion, fusions
from llmsparse.inference.lean import LeanLayer
from llmsparse.inference.lean_norm import lean_norms
from llmsparse.inference.packed_experts import packed_weights

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn


@dataclass(frozen=True)
class Explanation:
    """One choice a packed weight, in the order of the model, what runs each mixture of dense experts, and what else
    torch does not run. Bytes are those of the packed weights."""

    choices: list[Choice]
    experts: list[Fusion] = field(default_factory=list[Fusion])
    layers: list[LeanLayer] = field(default_factory=list[LeanLayer])

    @property
    def packed_bytes(self) -> int:
        """What the weights take packed."""
        return sum(choice.packed_bytes for choice in self.choices)

    @property
    def dense_bytes(self) -> int:
        """What they would take dense: the cost of `dense`, and on top of the packed ones of `optimize="speed"`."""
        return sum(choice.dense_bytes for choice in self.choices)

    @property
    def backends(self) -> dict[str, int]:
        """Backend → how many weights it runs."""
        return dict(Counter(choice.backend for choice in self.choices))

    @property
    def experts_run_by(self) -> dict[str, int]:
        """What runs dense experts, and gated layers beside them that run fused → how many modules it runs."""
        return dict(Counter(fusion.runs for fusion in self.experts))

    def to_json(self) -> dict[str, Any]:
        totals = {"packed_bytes": self.packed_bytes, "dense_bytes": self.dense_bytes, "backends": self.backends}
        kinds = {"choices": self.choices, "experts": self.experts, "layers": self.layers}
        return totals | {kind: [asdict(one) for one in found] for kind, found in kinds.items()}

    def table(self) -> RenderableType:
        from rich.table import Table

        table = Table("weight", "backend", "up to", "MB", "dense MB", "why", box=None, pad_edge=False)
        for choice in self.choices:
            limit = "any" if choice.tokens is None else f"{choice.tokens} tokens"
            sizes = (f"{choice.packed_bytes / 1e6:.2f}", f"{choice.dense_bytes / 1e6:.2f}")
            table.add_row(choice.weight, choice.backend, limit, *sizes, choice.because)
        for one in self.experts:
            limit = "any" if one.tokens is None else f"{one.tokens} tokens"
            table.add_row(one.module, one.runs, limit, "", "", one.because)
        for one in self.layers:
            limit = "any" if one.tokens is None else f"{one.tokens} tokens"
            table.add_row(one.layer, one.runs, limit, "", "", one.because)
        table.caption, table.caption_justify = "\n".join(self._notes()), "left"
        return table

    def __str__(self) -> str:
        """A line for each reason, for `print(llmsparse.explain(model))`."""
        weights = Counter((choice.backend, choice.because) for choice in self.choices)
        layers = Counter((one.runs, one.because) for one in self.experts)
        runs = [f"{count} weights run by {backend}: {because}" for (backend, because), count in weights.items()]
        lean = Counter((one.runs, one.tokens, one.because) for one in self.layers)
        runs += [self._lean(count, *kind) for kind, count in lean.items()]
        runs += [f"{count} layers of experts run by {what}: {because}" for (what, because), count in layers.items()]
        return "\n".join([*runs, *(self._notes() if self.choices else [])])

    def _lean(self, count: int, runs: str, tokens: int | None, because: str) -> str:
        first = next(one.layer for one in self.layers if (one.runs, one.tokens, one.because) == (runs, tokens, because))
        which = f"{first}, …" if count > 1 else first
        limit = "" if tokens is None else f" up to {tokens} tokens"
        return f"{count} layer{'s'[: count - 1]} run by {runs}{limit} ({which}): {because}"

    def _notes(self) -> list[str]:
        refused = {name: reason for choice in self.choices for name, reason in choice.refused.items()}
        sizes = f"{self.packed_bytes / 1e6:.1f} MB packed, {self.dense_bytes / 1e6:.1f} MB dense"
        return [sizes, *(f"not {name}: {reason}" for name, reason in refused.items())]


def explain(model: nn.Module) -> Explanation:
    """What runs the packed weights and the experts of a model that `from_pretrained` gave."""
    return Explanation(
        [weight.choice for _, weight in packed_weights(model)],
        list(fusions(model)),
        [*lean_attention(model), *lean_linears(model), *lean_norms(model), *cut_layers(model)],
    )
