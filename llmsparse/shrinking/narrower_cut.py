"""A block that gets narrower: what enters its projections is summed up, the pieces that stay are chosen, cut out, and fitted.

Each projection is worked on by the process that its sums are added up at.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsparse.calibration.least_squares import JUDGES
from llmsparse.errors import CheckpointError, NumericalError
from llmsparse.models.streamed import Activations, Block, Slot
from llmsparse.models.tap import Tap
from llmsparse.ranks.group import ALONE, Ranks
from llmsparse.ranks.share import Share
from llmsparse.shrinking.folding import adds, entering_last
from llmsparse.shrinking.narrowed_block import narrow
from llmsparse.shrinking.narrowing import Unit, positions
from llmsparse.shrinking.projection import Seen, energies, fit_columns, least_missed, loudest
from llmsparse.shrinking.reduction import Cut, Sum

if TYPE_CHECKING:
    from llmsparse.shrinking.width import Narrower

SAME = 1e-3  # relative difference of what a zero elsewhere must not change


class NarrowerCut(Cut):
    """At work on one block."""

    watches = True

    def __init__(self, plan: Narrower, block: Block, units: Sequence[Unit]) -> None:
        self._plan, self._block, self._units = plan, block, units
        self._share = Share(ALONE, ())
        self._rows: list[dict[str, Any]] = []
        self._unit = {unit.into.name: unit for unit in units}
        self._slots: list[Slot] = [
            (unit.into.name, expert)
            for unit in units
            for expert in ([None] if unit.experts is None else range(unit.experts))
        ]
        self._seen: dict[Slot, Seen | None] = {}
        self._owners: list[int] = []
        self._first: tuple[Activations, Tensor] | None = None  # the first batch, at the process that has it
        self._batch: dict[Slot, list[Tensor]] = {}  # what entered in the batch that runs

    def learn(self, acts: Activations, aims: Activations | None) -> None:
        self._share, ranks = acts.share, acts.share.ranks
        if ranks.first:
            self._first = acts, acts.hidden[0]
        known = self._plan.adding
        unknown = [unit for unit in self._units if unit not in known and unit.experts is None] if aims else []
        if unknown:
            found = ranks.known(lambda: [self._adds(unit, acts) for unit in unknown])
            known.update(zip(unknown, found, strict=True))

    @torch.no_grad()
    def _adds(self, unit: Unit, acts: Activations) -> bool:
        """Whether the output of a block is its output without a projection, and Wx; tried out on the first batch of the first
        of all blocks that are alike."""
        parameter = self._block.module.get_parameter(unit.into.name)
        entering, output = entering_last(self._block, acts, 0, (unit.into.name, None))
        if len(entering) != output[..., 0].numel():
            return False
        expected = entering @ self._matrix(unit, None).T
        return adds(parameter, expected, output, lambda: self._block.call(acts, 0))

    def owners(self, ranks: Ranks) -> list[int]:
        self._owners = ranks.assigned([self._unit[name].into.before ** 3 for name, _ in self._slots])
        return self._owners

    def begin_sums(self, leaf: int) -> Sequence[Sum]:
        for slot in self._slots:
            unit = self._unit[slot[0]]
            device = self._block.module.get_parameter(unit.into.name).device
            judges = -(-JUDGES // ((unit.experts or 1) * len(self._share.leaves)))
            start = (
                leaf if unit.experts else self._share.tokens_before(leaf)
            )  # who goes to an expert is not known before
            self._seen[slot] = Seen(unit.into.before, unit.pieces, device, self._plan.fits, judges, start)
        return [seen for slot in self._slots if (seen := self._seen[slot])]

    @contextmanager
    def watching(self, batch: int) -> Generator[None]:
        def note(slot: Slot, x: Tensor) -> None:  # x (tokens, width)
            if slot[0] in self._unit and len(x):
                self._batch.setdefault(slot, []).append(x.clone())

        with Tap(self._block, note):
            yield

    def watched(self, output: Tensor, aim: Tensor | None) -> None:
        for slot in list(self._batch):
            unit, x = self._unit[slot[0]], torch.cat(self._batch.pop(slot))
            lack = None
            if aim is not None and self._plan.adding.get(unit) and len(x) == output[..., 0].numel():
                lack = (aim.to(x.device).float() - output.to(x.device).float()).flatten(0, -2)
            if seen := self._seen[slot]:
                seen.update(x, lack)

    def take_sums(self, totals: Sequence[Any]) -> None:
        self._seen = dict(zip(self._slots, totals, strict=True))
        for (name, _), seen in self._seen.items():
            if seen is not None:
                seen.device = self._block.module.get_parameter(name).device  # it may have come from another process

    def cut(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Choose what stays, find out how it is laid out, cut it out, and fit the projections."""
        kept: dict[Unit, list[Tensor]] = {}
        fitted: dict[str, list[Tensor | None]] = {}
        for slot, (pieces, weight, row) in zip(
            self._slots, self._share.ranks.divided(self._slots, self._owners, self._one), strict=True
        ):
            kept.setdefault(self._unit[slot[0]], []).append(pieces)
            fitted.setdefault(slot[0], []).append(weight)
            self._rows.append(row)
        layouts = [self._layout(unit, kept[unit]) for unit in self._units]
        self._first = None
        pieces = [kept[unit] for unit in self._units]
        with self._share.ranks.together():
            return narrow(self._plan.model, self._block.index, tensors, self._units, layouts, pieces, fitted)

    def _matrix(self, unit: Unit, expert: int | None) -> Tensor:
        """A projection, (out, in) fp32."""
        parameter = self._block.module.get_parameter(unit.into.name).detach()
        matrix = (parameter if expert is None else parameter[expert]).float()
        return matrix if unit.into.dim == -1 else matrix.transpose(-1, -2)

    def _one(self, slot: Slot) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """The pieces that stay in one projection, what the projection becomes where a fit is better than a cut, and what is to
        be said of it."""
        unit, seen = self._unit[slot[0]], self._seen.pop(slot)
        assert seen is not None
        matrix = self._matrix(unit, slot[1])
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
        row = {
            "projection": unit.into.name if slot[1] is None else f"{unit.into.name}.{slot[1]}",
            "tokens": seen.tokens,
            "chosen_by": how,
            "energy": None if energy is None else (energy[pieces].sum() / energy.sum().clamp_min(1e-30)).item(),
            "error_cut": result.before,
            "error": result.after,
            "damp": result.damp,
        }
        return pieces.cpu(), None if result.damp is None else result.weight, row

    def _layout(self, unit: Unit, kept: Sequence[Tensor]) -> int:
        """How the axes of a unit are laid out, tried out once for all blocks that are alike."""
        known = self._plan.layouts
        if unit not in known:
            fits = (layout for layout in range(unit.layouts) if self._unchanged(unit, layout, kept))
            known[unit] = self._share.ranks.known(lambda: next(fits, -1))
        with self._share.ranks.together():
            if known[unit] < 0:
                raise CheckpointError(
                    f"{self._block.name}: {unit.into.name} does not take in its {self._plan.pieces} one by one: what stays "
                    f"changes with what goes, so {self._plan.model.config.model_type} cannot be cut with --{self._plan.name}"
                )
        return known[unit]

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
        assert self._first is not None
        acts, hidden = self._first
        found: dict[Slot, Tensor] = {}

        def note(slot: Slot, x: Tensor) -> None:
            if slot[0] == unit.into.name and len(x):
                found[slot] = x.clone()

        with Tap(self._block, note):
            self._block.call(acts, 0, hidden)
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
