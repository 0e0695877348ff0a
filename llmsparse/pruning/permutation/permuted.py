"""What became of the matrices whose inputs might be reordered, for the journal and the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Permuted:
    """What became of a matrix whose inputs may be reordered; one row for all experts of a parameter."""

    name: str  # on disk, of the first weight
    folds: bool
    before: float = 0.0  # share of the score that the pattern keeps, as it was
    after: float = 0.0  # and in the new order
    difference: float = 0.0  # of the block's output, relative, with all its matrices reordered


def spell_permuted(rows: Sequence[Permuted]) -> str:
    """In a line of the summary."""
    made = [row for row in rows if row.folds]
    before, after = (sum(getattr(row, what) for row in made) / max(1, len(made)) for what in ("before", "after"))
    return (
        f"inputs of {len(made)} of {len(rows)} matrices; the pattern keeps {before:.4f} → {after:.4f} of their scores"
    )


def unfolded(rows: Sequence[Permuted]) -> Iterator[str]:
    """A warning of those that kept their order."""
    stay = [row for row in rows if not row.folds]
    if stay:
        yield (
            f"the inputs of {len(stay)} of {len(rows)} matrices, {stay[0].name} first, keep their order: what enters them does "
            "not follow when the outputs beside them change places"
        )
