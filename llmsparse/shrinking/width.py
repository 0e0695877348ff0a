"""Narrower layers: what `ffn` and `heads` have in common. A block is watched, the pieces of least energy are cut out of every
parameter that computes them, and the matrix that took them in is fitted to what it gave with all of them.

How an axis is laid out where several things share it (gate and up, query, key and value, one behind the other or by turns)
is tried out: with what is cut set to zero, what stays must not change. That also tells whether a piece can be cut at all.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmsparse.calibration.least_squares import HELD_BACK, JUDGES
from llmsparse.errors import CheckpointError, NumericalError
from llmsparse.models.block import unwrap
from llmsparse.models.streamed import Block, Slot, StreamedModel
from llmsparse.models.tap import Tap
from llmsparse.shrinking.folding import adds
from llmsparse.shrinking.narrowed_block import narrow
from llmsparse.shrinking.narrowing import Unit, positions
from llmsparse.shrinking.projection import Seen, energies, fit_columns, least_missed, loudest
from llmsparse.shrinking.reduction import Cut, Reduction, Rows, Source, Specs

SAME = 1e-3  # relative difference of what a zero elsewhere must not change


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

    def memory_bytes(self, tokens: int, batches: int) -> int:
        """XᵀX of every projection of a block, rows of the tokens held back, and the equations of one that are solved; what enters
        them in a batch."""
        entering = max(sum(unit.into.before for unit in units) for units in self.units)
        held = max(sum(self._held(unit, tokens) for unit in units) for units in self.units)
        return held + 4 * entering * -(-tokens // max(1, batches))

    def _held(self, unit: Unit, tokens: int) -> int:
        width, experts = unit.into.before, unit.experts or 1
        if not self.fits:
            return 4 * experts * width * width // unit.pieces
        rows, hidden = min(tokens // HELD_BACK, JUDGES), self.model.hidden_size  # in fp32, and what is left of them
        lacking = (width + rows) * hidden
        equations = max(
            3 * unit.into.after**2 + width * unit.into.after, 6 * width**2
        )  # or three in fp64, to choose by
        return 4 * (experts * width * width + 2 * rows * width + lacking + equations)

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


class NarrowerCut(Cut):
    """At work on one block."""

    watches = True

    def __init__(self, plan: Narrower, block: Block, units: Sequence[Unit]) -> None:
        self._plan, self._block, self._units = plan, block, units
        self._seen: dict[Slot, Seen] = {}
        self._call: tuple[Any, Any] | None = None  # of the first batch
        self._rows: list[dict[str, Any]] = []
        self._unit = {unit.into.name: unit for unit in units}
        self._batch: dict[Slot, list[Tensor]] = {}  # what entered in the batch that runs

    @contextmanager
    def watching(self, batch: int) -> Generator[None]:
        first = batch == 0 and any(unit not in self._plan.layouts for unit in self._units)

        def note(slot: Slot, x: Tensor) -> None:  # x (tokens, width)
            if slot[0] in self._unit and len(x):
                self._batch.setdefault(slot, []).append(x.clone())

        def keep(module: Any, args: Any, kwargs: Any) -> None:
            self._call = (args, kwargs)

        hook = self._block.module.register_forward_pre_hook(keep, with_kwargs=True) if first else None
        try:
            with Tap(self._block, note):
                yield
        finally:
            if hook is not None:
                hook.remove()

    def watched(self, output: Tensor, aim: Tensor | None) -> None:
        for slot in list(self._batch):
            unit, x = self._unit[slot[0]], torch.cat(self._batch.pop(slot))
            lack = None
            if (
                aim is not None
                and unit.experts is None
                and len(x) == output[..., 0].numel()
                and self._adds(unit, x, output)
            ):
                lack = (aim.to(x.device).float() - output.to(x.device).float()).flatten(0, -2)
            if slot not in self._seen:
                judges = JUDGES // (unit.experts or 1)
                self._seen[slot] = Seen(x.shape[-1], unit.pieces, x.device, self._plan.fits, judges)
            self._seen[slot].update(x, lack)

    @torch.no_grad()
    def _adds(self, unit: Unit, x: Tensor, output: Tensor) -> bool:
        """Whether the output of a block is its output without a projection, and Wx; tried out on the first batch of the first
        of all blocks that are alike."""
        known = self._plan.adding
        if unit not in known and self._call is not None:
            (args, kwargs), module = self._call, self._block.module
            parameter, expected = module.get_parameter(unit.into.name), x.float() @ self._matrices(unit)[0].T
            known[unit] = adds(parameter, expected, output.to(x.device), lambda: unwrap(module(*args, **kwargs)))
        return known.get(unit, False)

    def cut(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Choose what stays, find out how it is laid out, cut it out, and fit the projections."""
        kept: list[list[Tensor]] = []
        fitted: dict[str, list[Tensor | None]] = {}
        for unit in self._units:
            slots: list[Slot] = [(unit.into.name, expert) for expert in range(unit.experts or 0)] or [
                (unit.into.name, None)
            ]
            matrices = self._matrices(unit)
            found = [self._one(unit, slot, matrix) for slot, matrix in zip(slots, matrices, strict=True)]
            kept.append([pieces.cpu() for pieces, _ in found])
            fitted[unit.into.name] = [weight for _, weight in found]
        layouts = [self._layout(unit, one) for unit, one in zip(self._units, kept, strict=True)]
        self._call = None
        self._seen.clear()
        return narrow(self._plan.model, self._block.index, tensors, self._units, layouts, kept, fitted)

    def _matrices(self, unit: Unit) -> list[Tensor]:
        """The projections of a unit, (out, in) fp32 each."""
        parameter = self._block.module.get_parameter(unit.into.name).detach().float()
        matrix = parameter if unit.into.dim == -1 else parameter.transpose(-1, -2)
        return [matrix] if unit.experts is None else list(matrix)

    def _one(self, unit: Unit, slot: Slot, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The pieces that stay in one projection, and what the projection becomes where a fit is better than a cut."""
        seen = self._seen.get(slot) or Seen(matrix.shape[1], unit.pieces, matrix.device, self._plan.fits)
        try:
            choices = {"energy": loudest(matrix, seen, unit.kept)}
        except NumericalError as error:
            raise NumericalError(f"{self._block.name}.{unit.into.name}: {error}") from error
        energy = energies(matrix, seen) if seen.tokens else None
        if seen.gram is not None:
            choices["least missed"] = least_missed(matrix, seen, unit.kept)
        fits = {
            how: fit_columns(matrix, positions(unit.into, 0, unit.pieces, one), seen) for how, one in choices.items()
        }
        how = min(fits, key=lambda how: (fits[how].after is None, fits[how].after))
        pieces, result = choices[how], fits[how]
        self._rows.append(
            {
                "projection": unit.into.name if slot[1] is None else f"{unit.into.name}.{slot[1]}",
                "tokens": seen.tokens,
                "chosen_by": how,
                "energy": None if energy is None else (energy[pieces].sum() / energy.sum().clamp_min(1e-30)).item(),
                "error_cut": result.before,
                "error": result.after,
                "damp": result.damp,
            }
        )
        return pieces, None if result.damp is None else result.weight

    def _layout(self, unit: Unit, kept: Sequence[Tensor]) -> int:
        """How the axes of a unit are laid out, tried out once for all blocks that are alike."""
        known = self._plan.layouts
        if unit not in known and self._call is not None:
            fits = (layout for layout in range(unit.layouts) if self._unchanged(unit, layout, kept))
            known[unit] = next(fits, -1)
        if known.get(unit, 0) < 0:
            raise CheckpointError(
                f"{self._block.name}: {unit.into.name} does not take in its {self._plan.pieces} one by one: what stays changes "
                f"with what goes, so {self._plan.model.config.model_type} cannot be cut with --{self._plan.name}"
            )
        return known.get(unit, 0)

    @torch.no_grad()
    def _unchanged(self, unit: Unit, layout: int, kept: Sequence[Tensor]) -> bool:
        """Whether what stays is the same with all that computes the rest set to zero."""
        module = self._block.module
        before = {axis.name: module.get_parameter(axis.name).data for axis in unit.out}
        wanted = self._entering(unit)
        try:
            for axis in unit.out:
                module.get_parameter(axis.name).data = zeroed(before[axis.name], unit, axis.name, layout, kept)
            met = self._entering(unit)
        finally:
            for name, tensor in before.items():
                module.get_parameter(name).data = tensor
        if not wanted or {slot: x.shape for slot, x in met.items()} != {slot: x.shape for slot, x in wanted.items()}:
            return False
        for slot, x in wanted.items():
            columns = positions(unit.into, 0, unit.pieces, kept[slot[1] or 0]).to(x.device)
            one, other = x[:, columns].float(), met[slot][:, columns].float()
            if not bool((one - other).norm() <= SAME * one.norm()):
                return False
        return True

    def _entering(self, unit: Unit) -> dict[Slot, Tensor]:
        """What enters the projections of a unit in the first batch."""
        assert self._call is not None
        args, kwargs = self._call
        found: dict[Slot, Tensor] = {}

        def note(slot: Slot, x: Tensor) -> None:
            if slot[0] == unit.into.name and len(x):
                found[slot] = x.clone()

        with Tap(self._block, note):
            self._block.module(*args, **kwargs)
        return found

    def row(self) -> dict[str, Any]:
        return {"units": self._rows}


def zeroed(tensor: Tensor, unit: Unit, name: str, layout: int, kept: Sequence[Tensor]) -> Tensor:
    """A copy of a parameter of a unit in which the pieces that are not kept are zero."""
    axis = next(axis for axis in unit.out if axis.name == name)
    found = tensor.clone()
    for number, one in enumerate(kept):
        goes = torch.ones(unit.pieces, dtype=torch.bool)
        goes[one] = False
        places = positions(axis, layout, unit.pieces, goes.nonzero()[:, 0]).to(tensor.device)
        (found if unit.experts is None else found[number]).index_fill_(axis.dim, places, 0)
    return found


def laid_out(source: Source) -> dict[str, bool]:
    """Every matrix that activations are multiplied with → laid out (in, out)."""
    return {name: flag for _, names in source.model.matrices() for name, flag in names.items()}
