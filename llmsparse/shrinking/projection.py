"""The matrix that takes pieces in, channels of an FFN or heads: which of them matter, and what it becomes without the others.

A piece adds W_p x_p to the output; its energy is Σ ‖W_p x_p‖² over calibration tokens, for a channel (Σ h²)·‖w‖². What is
cut is made up for in closed form: the columns that stay are fitted to the output of the whole matrix
(calibration/least_squares), judged on tokens held back. Where they are fitted, pieces that others can stand in for may go
before quieter ones: those are tried as well that a fit misses least, one after the other.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmsparse.calibration.least_squares import HELD_BACK, JUDGES, error, fit
from llmsparse.errors import NumericalError
from llmsparse.sparsity.patterns import is_sparse
from llmsparse.sparsity.stats import Gram

ROUNDS = 64  # in which pieces go
SURGEON_DAMP = 0.01  # λ as a fraction of the mean of the diagonal
PULL = 0.5  # of what the blocks before lack: all of it is more than this input can tell, and worse


@dataclass
class Seen:
    """What some batches say of the input of one projection, x (tokens, width) in `pieces` equal pieces."""

    width: int
    pieces: int
    device: torch.device
    fits: bool  # XᵀX as a whole is wanted, not only what lies within a piece
    judges: int = JUDGES  # tokens held back, at most
    start: int = 0  # the number of the first token: one in so many is held back
    tokens: int = 0
    gram: Gram | None = None
    squares: Tensor | None = None  # of each piece its part of XᵀX, (pieces, size, size)
    held: list[Tensor] = field(default_factory=list[Tensor])  # rows of the tokens held back
    lacks: Tensor | None = None  # Xᵀ times what the output is to have besides, (width, out)
    held_lacks: list[Tensor] = field(default_factory=list[Tensor])  # (tokens, out) of the tokens held back

    def update(self, x: Tensor, lack: Tensor | None = None) -> None:
        """Take in x (tokens, width), and what the output (tokens, out) is to have besides Wx."""
        number = torch.arange(len(x), device=x.device) + self.start + self.tokens
        self.tokens += len(x)
        if not self.fits:
            self.squares = self._within(x.float()) + (0 if self.squares is None else self.squares)
            return
        judge = number % HELD_BACK == HELD_BACK - 1
        if lack is not None:
            lack = PULL * lack.float()
            self.lacks = x[~judge].float().T @ lack[~judge] + (0 if self.lacks is None else self.lacks)
        if (room := self.judges - sum(map(len, self.held))) > 0:
            self.held.append(x[judge][:room].clone())
            self.held_lacks += [] if lack is None else [lack[judge][:room].clone()]
        self.gram = self.gram or Gram(self.width, self.device)
        self.gram.update(x[~judge])

    def merge(self, other: Seen) -> Seen:
        """This, with later batches."""
        self.tokens += other.tokens
        self.held += other.held
        self.held_lacks += other.held_lacks
        self.squares = _both(self.squares, other.squares)
        self.lacks = _both(self.lacks, other.lacks)
        if self.gram is not None and other.gram is not None:
            self.gram.merge(other.gram)
        self.gram = self.gram or other.gram
        return self

    def _within(self, x: Tensor) -> Tensor:
        parts = x.view(len(x), self.pieces, -1)
        return torch.einsum("tpa,tpb->pab", parts, parts)

    def within(self) -> Tensor:
        """Σ x_p x_pᵀ of each piece, (pieces, size, size) fp32. NumericalError where an activation was NaN or Inf."""
        size = self.width // self.pieces
        if self.squares is None and self.gram is not None:
            whole = self.gram.xtx.view(self.pieces, size, self.pieces, size)
            self.squares = torch.diagonal(whole, dim1=0, dim2=2).permute(2, 0, 1)
        if self.squares is None:
            return torch.zeros(self.pieces, size, size, device=self.device)
        if not bool(torch.isfinite(self.squares).all()):
            raise NumericalError("the activations are NaN or Inf; try --dtype float32, or check the model")
        return self.squares


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two, either of which may not be there."""
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


@dataclass(frozen=True)
class Fitted:
    """A projection without the pieces that were cut."""

    weight: Tensor  # (out, what stays) fp32
    before: float | None  # relative squared error of the output on the tokens held back: as it was cut …
    after: float | None  # … and as it was fitted; None where nothing was held back
    damp: float | None  # of the fit; None where it was left as it was cut


def energies(weight: Tensor, seen: Seen) -> Tensor:
    """Σ ‖W_p x_p‖² of every piece, for W (out, width) fp32: (pieces,)."""
    parts = weight.view(len(weight), seen.pieces, -1)  # (out, pieces, size)
    return (torch.einsum("opa,opb->pab", parts, parts) * seen.within()).sum((1, 2))


def loudest(weight: Tensor, seen: Seen, count: int) -> Tensor:
    """The numbers of the `count` pieces of the highest energy, ascending; by the weight alone where no token was seen."""
    alone = weight.view(len(weight), seen.pieces, -1).square().sum((0, 2))
    energy = energies(weight, seen) if seen.tokens else alone
    return energy.argsort(descending=True, stable=True)[:count].sort().values


def least_missed(weight: Tensor, seen: Seen, count: int) -> Tensor:
    """The numbers of `count` pieces, ascending, that are left when those go without which the rest can be fitted best.

    With W fitted to the pieces that are left, taking p away costs W_p (H⁻¹_pp)⁻¹ W_pᵀ, H = XᵀX + λ: the structured form of
    Optimal Brain Surgeon (Hassibi, Stork 1993; ZipLM, arXiv 2302.04089). After each of a few rounds W and H⁻¹ are those of what
    is left.
    """
    assert seen.gram is not None
    size, device = seen.width // seen.pieces, weight.device
    products = seen.gram.xtx.double()
    products.diagonal().add_(SURGEON_DAMP * products.diagonal().mean())
    inverse = torch.linalg.inv(products)
    del products
    weight = weight.double().clone()  # (out, width)
    if seen.lacks is not None:
        weight += (inverse @ seen.lacks.double()).T  # fitted, with all pieces
    left = torch.arange(seen.pieces, device=device)
    within = torch.arange(size, device=device)
    for rounds in range(min(ROUNDS, seen.pieces - count), 0, -1):
        columns = left[:, None] * size + within  # (left, size)
        blocks = inverse[columns[:, :, None], columns[:, None, :]]  # (left, size, size)
        parts = weight[:, columns].permute(1, 2, 0)  # (left, size, out)
        cost = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
        goes = cost.argsort(stable=True)[: -(-(len(left) - count) // rounds)]
        gone = columns[goes].flatten()
        change = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])  # (gone, width)
        weight -= weight[:, gone] @ change
        inverse.addmm_(inverse[:, gone], change, alpha=-1)
        stays = torch.ones(len(left), dtype=torch.bool, device=device)
        stays[goes] = False
        left = left[stays]
    return left


def fit_columns(weight: Tensor, columns: Tensor, seen: Seen) -> Fitted:
    """W (out, width) fp32 with these columns alone, fitted to Wx where that is better on the tokens held back. A weight that
    is sparse already is not fitted, which would fill its zeros."""
    start = weight[:, columns]
    if seen.gram is None or not seen.held or is_sparse(weight):
        return Fitted(start, None, None, None)
    gram = seen.gram.xtx[columns]  # (what stays, width)
    rows = [x.float() for x in seen.held]
    lacks = seen.held_lacks or [torch.zeros(())] * len(rows)
    judges = [(x[:, columns], x @ weight.T + lack.to(x.device)) for x, lack in zip(rows, lacks, strict=True)]
    whole = sum(y.square().sum().item() for _, y in judges)
    if not gram.any() or not whole:
        return Fitted(start, None, None, None)
    targets = gram @ weight.T + (0 if seen.lacks is None else seen.lacks[columns])
    fitted = fit(gram[:, columns].contiguous(), targets, start, judges)
    before, after = (error(one, judges) / whole for one in (start, fitted.weight))
    return Fitted(fitted.weight, before, after, fitted.damp)
