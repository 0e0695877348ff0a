"""The last projection of every expert that stays, fitted so that together they come closest to what all of them gave.

argmin_W̃ Σ ‖y − Σ_j g_j W̃_j h_j‖², where y is what all experts gave, g and h the gates and hidden units of the smaller
mixture on the same tokens. One expert after the other takes what is left, r = y − Σ_j g_j W_j h_j (block coordinate
descent: the error never rises on what is fitted): W̃ = W + Δ, Δ = argmin Σ ‖r − Δ g h‖² + λ‖Δ‖². Tokens of one batch in
eight are not fitted on: they choose λ, and judge whether all of it helps. Of several processes each has the tokens of its
batches, leaf by leaf of the tree in which equations are added up; the first one solves them.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.calibration.least_squares import JUDGES, Fit, fit
from llmsparse.calibration.matching import HELD_OUT_SHARE
from llmsparse.models.streamed import Activations, Block, Weight
from llmsparse.models.tap import Tap
from llmsparse.ranks.share import Share
from llmsparse.scoring.mixture import Call, Mixture, intercepted
from llmsparse.sparsity.patterns import is_sparse

LEAST_GAIN = 0.01  # of the error: less is not worth rounding weights anew
NOISE = 1e-6  # an error that is nothing but rounding, in float32
CHUNK = 2048  # tokens at a time, whatever an expert is sent
DECIDING = 256  # outputs, about, that decide how strongly an expert is held to what it was
TOKENS_PER_INPUT, LEAST_TOKENS = 32, 2**15  # twice as many take another 5 % of the loss away, half as many add 30 %


def one_in(tokens: int, inner: int, kept: int, active: int) -> int:
    """Of so many batches, with `tokens` in all, one is enough to fit on where each token is sent to `active` of `kept`
    experts with `inner` hidden units."""
    return max(1, tokens // max(LEAST_TOKENS, TOKENS_PER_INPUT * inner * kept // active))


class Left(NamedTuple):
    """What the experts of a block do not give of what they should, on the tokens of one leaf."""

    call: Call  # of the experts, on these tokens
    r: Tensor  # (tokens, width), float32
    judging: Tensor  # (tokens,) tokens that are not fitted on

    def error(self) -> float:
        """Σ ‖r‖² of the tokens that judge."""
        return self.r[self.judging].square().sum().item()


@dataclass
class Equations:
    """Of one expert, on some of its tokens."""

    gram: Tensor  # Σ g²hhᵀ
    along: Tensor  # Σ g h rᵀ
    judges: list[tuple[Tensor, Tensor]]  # g h and r of tokens that judge
    seen: bool = True  # hidden units were seen one for each token

    def merge(self, other: Equations) -> Equations:
        """These, with those of later tokens."""
        self.seen &= other.seen
        if self.seen:
            self.gram += other.gram
            self.along += other.along
            self.judges += other.judges
        return self


def refit_experts(made: Block, acts: Activations, mixture: Mixture, targets: dict[int, Tensor]) -> dict[str, Any]:
    """Fit last projections in `made.stored` where that helps; returns what is to be said of it.

    `mixture` is that of the made block; `targets` are (tokens, width) of numbered batches, those that are held here: what
    all experts gave, and are let go of. An expert that is sparse already is left as it is: a fit would fill its zeros.
    """
    share = acts.share
    dtypes = share.collected({batch: target.dtype for batch, target in targets.items()})
    judges = set(list(dtypes)[::HELD_OUT_SHARE])
    if len(dtypes) == len(judges):
        targets.clear()
        return {"kept": False, "why": "one batch of calibration: none to judge by"}
    energies = {batch: targets[batch].float().square().sum().item() for batch in judges & targets.keys()}
    energy = max(sum(share.collected(energies).values()), 1e-300)
    left = what_is_left(made, acts, mixture, targets, judges)

    def error() -> float:
        return sum(share.collected({number: one.error() for number, one in left.items()}).values()) / energy

    before = error()
    said = {"kept": False, "error_before": before, "error_after": before}
    if before <= max(NOISE, 4 * torch.finfo(dtypes[min(judges)]).eps ** 2):
        return said
    weights = last_projections(made, mixture)
    kept = {weight.key: made.stored[weight.key] for weight in weights}
    judging = sum(not judges.isdisjoint(numbers) for numbers in share.leaves)
    most = -(-JUDGES // judging)
    made.stored.update({key: tensor.clone() for key, tensor in kept.items()})
    try:
        changed = [weight.slot[1] for weight in weights if refit_expert(made, weight, left, share, most)]
    except Unseen:
        made.stored.update(kept)
        return said | {"why": "hidden units of experts are not seen one for each token"}
    after = error()
    if after < (1 - LEAST_GAIN) * before:
        made.reload()
        return {"kept": True, "error_before": before, "error_after": after, "experts": changed}
    made.stored.update(kept)
    return said | {"error_after": after}


def what_is_left(
    made: Block, acts: Activations, mixture: Mixture, targets: dict[int, Tensor], judges: set[int]
) -> dict[int, Left]:
    """Of `targets`, which are let go of, by the leaf that they lie in; the batches that are `judges` judge."""
    found: dict[int, Left] = {}
    for leaf, numbers in enumerate(acts.share.leaves):
        batches = [batch for batch in targets if batch in numbers]
        if not batches:
            continue
        sizes, target = [len(targets[batch]) for batch in batches], targets[batches[0]]
        r = target.new_empty(sum(sizes), target.shape[1], dtype=torch.float32)
        judging = torch.zeros(len(r), dtype=torch.bool, device=r.device)
        calls: list[Call] = []
        for batch, rest, judged in zip(batches, r.split(sizes), judging.split(sizes), strict=True):
            calls.append(called(made, acts, mixture, acts.share.place(batch)))
            torch.sub(targets.pop(batch).float(), calls[-1].observe().output.float(), out=rest)
            judged.fill_(batch in judges)
        found[leaf] = Left(Call.joined(calls), r, judging)
    return found


def refit_expert(made: Block, weight: Weight, left: dict[int, Left], share: Share, most: int) -> bool:
    """Fit the last projection of one expert to what is `left`, and take from that what it then gives; False where it stays
    as it is. `most`: tokens of each leaf that judge. Its hidden units are multiplied in the dtype that they come in, and their
    Gram matrix in float32."""
    start = made.view(weight).to(made.module.get_parameter(weight.slot[0]).device, torch.float32, copy=True)
    if is_sparse(start):  # (width, in)
        return False
    units: dict[int, tuple[Tensor, Tensor]] = {}

    def leaf(number: int) -> list[Equations | None]:
        if number not in left:
            return [None]
        try:
            units[number] = hidden_units(made, weight, left[number].call)
        except Unseen:
            return [Equations(start.new_zeros(()), start.new_zeros(()), [], seen=False)]
        return [equations(*units[number], left[number], start, most)]

    def solved() -> Fit | None:
        """Of all tokens; None where hidden units were not seen."""
        assert total is not None
        if not total.seen:
            return None
        return fit(total.gram, total.along, torch.zeros_like(start), total.judges, max(1, len(start) // DECIDING))

    [total] = share.summed(leaf, both, [0])
    found = share.ranks.known(solved)
    if found is None:
        raise Unseen
    if found.damp is None:
        return False
    with share.ranks.together():
        made.store(weight, start + found.weight)
    stored = made.view(weight).to(start) - start
    for number, (tokens, h) in units.items():
        change = stored.to(h.dtype)
        for some, x in zip(tokens.split(CHUNK), h.split(CHUNK), strict=True):
            left[number].r.index_add_(0, some, (x @ change.T).float(), alpha=-1)
    return True


def equations(tokens: Tensor, h: Tensor, left: Left, start: Tensor, judges: int) -> Equations:
    """Of an expert's tokens (some,) and what enters its last projection (some, in); `judges`: how many judge at most."""
    width, size = start.shape
    gram, along = start.new_zeros(size, size), start.new_zeros(size, width)
    fitted = ~left.judging[tokens]
    for some, x in zip(tokens[fitted].split(CHUNK), h[fitted].split(CHUNK), strict=True):
        gram.addmm_(x.float().T, x.float())
        along += x.T @ left.r[some].to(x.dtype)
    held = (~fitted).nonzero()[:judges, 0]
    return Equations(gram, along, [(h[held].float(), left.r[tokens[held]])])


def both(one: Equations | None, other: Equations | None) -> Equations | None:
    """Of two leaves, either of which may have no token that is fitted on."""
    if one is None or other is None:
        return other if one is None else one
    return one.merge(other)


def last_projections(made: Block, mixture: Mixture) -> list[Weight]:
    """One of each expert, in their order."""
    found = [weight for weight in made.weights if weight.slot[0] == mixture.down]
    return sorted(found, key=lambda weight: weight.slot[1] or 0)


def hidden_units(made: Block, weight: Weight, call: Call) -> tuple[Tensor, Tensor]:
    """The tokens (some,) that are sent to an expert, and g h (some, in): what enters its last projection, times the gate."""
    expert = weight.slot[1] or 0
    tokens, gates = call.sent(expert)
    seen: list[Tensor] = []

    def note(slot: tuple[str, int | None], x: Tensor) -> None:
        if slot == weight.slot:
            seen.append(x.clone())
            raise _Seen

    for some in tokens.split(CHUNK):
        with suppress(_Seen), Tap(made, note):
            call.run(expert, some)
    h = torch.cat(seen) if seen else gates.new_zeros(0, weight.shape[1])
    if len(h) != len(tokens):
        raise Unseen
    return tokens, (h * gates[:, None]).to(h.dtype)


class Unseen(Exception):
    """An expert multiplies its last projection with something else than one vector a token."""


class _Seen(Exception):
    """What enters the last projection is known; what comes out need not be computed."""


class _Called(Exception):
    """How the experts are called is known; the rest of the block need not run."""


def called(made: Block, acts: Activations, mixture: Mixture, batch: int) -> Call:
    """The call of the block's experts on one batch."""
    calls: list[Call] = []

    def keep(call: Call) -> Tensor:
        calls.append(call)
        raise _Called

    with suppress(_Called), intercepted(made, mixture, keep):
        made.call(acts, batch)
    return calls[0]
