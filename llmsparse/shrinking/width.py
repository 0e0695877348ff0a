"""Narrower layers: what `ffn` and `heads` have in common. A block is watched, the pieces of least energy are cut out of every
parameter that computes them, and the matrix that took them in is fitted to what it gave with all of them.

How an axis is laid out where several things share it (gate and up, query, key and value, one behind the other or by turns)
is tried out: with what is cut set to zero, what stays must not change. That also tells whether a piece can be cut at all.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from llmsparse.calibration.least_squares import HELD_BACK, JUDGES
from llmsparse.models.streamed import Block, StreamedModel
from llmsparse.ranks.share import Share
from llmsparse.shrinking.narrowed_block import narrow
from llmsparse.shrinking.narrower_cut import NarrowerCut
from llmsparse.shrinking.narrowing import Unit
from llmsparse.shrinking.reduction import Cut, Reduction, Rows, Source, Specs
from llmsparse.sparsity.stats import Gram


@dataclass(frozen=True)
class Narrower(Reduction):
    """Units of blocks with fewer pieces."""

    name: ClassVar[str]
    pieces: ClassVar[str]  # what they are called

    model: StreamedModel
    fields: dict[str, int]  # of config.json
    units: list[list[Unit]]  # of each block
    fits: bool
    layouts: dict[Unit, int] = field(default_factory=dict[Unit, int])  # as they were found on the first block of a kind
    adding: dict[Unit, bool] = field(
        default_factory=dict[Unit, bool]
    )  # Wx adds to the output of a block as it is; the same
    aims: ClassVar[bool] = True

    def change(self, raw: dict[str, Any]) -> None:
        raw.update(self.fields)

    def resized(self, index: int, specs: Specs) -> Specs:
        tensors = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in specs.items()}
        kept = [
            [torch.empty(unit.kept, dtype=torch.int64, device="meta")] * (unit.experts or 1)
            for unit in self.units[index]
        ]
        cut = narrow(self.model, index, tensors, self.units[index], [0] * len(kept), kept, {})
        return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in cut.items()}

    def memory_bytes(self, share: Share) -> int:
        """XᵀX of every projection of a block, rows of the tokens held back, and the equations of one that are solved; what enters
        them in a batch."""
        entering = max(sum(unit.into.before for unit in units) for units in self.units)
        held = max(
            sum(self._summed(unit, share) for unit in units)
            + max((self._solving(unit, share) for unit in units), default=0)
            for units in self.units
        )
        return held + 4 * entering * -(-share.tokens // max(1, share.total))

    def _summed(self, unit: Unit, share: Share) -> int:
        """In the tree, while it is added up."""
        width, experts = unit.into.before, unit.experts or 1
        if not self.fits:
            return share.sums_at_once * 4 * experts * width * width // unit.pieces
        rows = min(share.tokens // HELD_BACK, JUDGES)
        lacking = (share.sums_at_once * width + rows) * self.model.hidden_size * (unit.experts is None)
        return share.sums_at_once * experts * Gram.nbytes(width) + 4 * (rows * width + lacking)

    def _solving(self, unit: Unit, share: Share) -> int:
        """XᵀX of one projection as a whole, and three times what is left of it, or three in fp64, to choose by; its rows."""
        if not self.fits:
            return 0
        width, rows = unit.into.before, min(share.tokens // HELD_BACK, JUDGES)
        equations = max(3 * unit.into.after**2 + width * unit.into.after, 6 * width**2)
        return 4 * (width * width + rows * width + equations)

    def begin(self, block: Block) -> Cut:
        units = self.units[block.index]
        return NarrowerCut(self, block, units) if units else Cut()

    def describe(self) -> str:
        kinds = dict.fromkeys((unit.kept, unit.pieces) for units in self.units for unit in units)
        count = sum(bool(units) for units in self.units)
        amounts = ", ".join(f"{kept} of {pieces}" for kept, pieces in kinds)
        return f"{amounts} {self.pieces} stay in each of {count} layers"

    def findings(self, rows: Rows) -> list[tuple[str, str]]:
        parts = [part for _, row in rows for part in row["units"]]
        kept = [part["energy"] for part in parts if part["energy"] is not None]
        text = f"{self.describe()}, with {sum(kept) / max(1, len(kept)):.1%} of the output's energy"
        errors = [part for part in parts if part["error_cut"] is not None]
        if errors:
            cut, fitted = (sum(part[key] for part in errors) / len(errors) for key in ("error_cut", "error"))
            text += f"; error of the output {cut:.4f}, {fitted:.4f} after refit"
        return [(self.name, text)]


def laid_out(source: Source) -> dict[str, bool]:
    """Every matrix that activations are multiplied with → laid out (in, out)."""
    return {name: flag for _, names in source.model.matrices() for name, flag in names.items()}
