"""DSnoT: swaps that obey the pattern, and lower what they say they lower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from llmsparse.errors import RecipeError
from llmsparse.pruners import ALPS, DSnoT, Magnitude, Pruned, Pruner, SparseGPT, Wanda
from llmsparse.sparsity.patterns import NofM, Pattern, Unstructured
from llmsparse.sparsity.stats import Gram, InputMoments

Layer = tuple[torch.Tensor, Gram]
INITIALS: list[Pruner] = [Wanda(), Magnitude(), SparseGPT(), ALPS()]
PATTERNS: list[Pattern] = [Unstructured(0.5, "row"), Unstructured(0.8, "matrix"), NofM(2, 4), NofM(1, 8)]


def mean_error(weight: torch.Tensor, pruned: torch.Tensor, stat: InputMoments) -> torch.Tensor:
    """ε (out,)."""
    return (weight - pruned).double() @ stat.mean.double()


def expected_error(weight: torch.Tensor, pruned: torch.Tensor, stat: InputMoments) -> torch.Tensor:
    """E (out,): (Σ w·mean)² + Σ w²·variance over what is missing."""
    gap = (weight - pruned).double()
    return mean_error(weight, pruned, stat).square() + gap.square() @ stat.variance.double()


def moments(mean: list[float], deviation: list[float]) -> InputMoments:
    """Two tokens that have exactly these."""
    stat = InputMoments(len(mean), torch.device("cpu"))
    centre, spread = torch.tensor(mean), torch.tensor(deviation)
    stat.update(torch.stack([centre - spread, centre + spread]))
    return stat


def test_by_hand(generator: torch.Generator) -> None:
    # Wanda's scores |w|·√(μ² + σ²)·√2: 1, 2.24, 2.83, 4.12 → prunes columns 0 and 1: ε = 3, E = 9.
    # Swapping 0 and 2: ε = 0 and E = 4; 1 and 2: ε = -1 and E = 5; 0 and 3: ε = 6; 1 and 3: ε = 5.
    stat = moments([1.0, 2.0, -2.0, 4.0], [0.0, 0.0, 2.0, 1.0])
    weight = torch.ones(1, 4)
    result = DSnoT()(weight, stat, Unstructured(0.5, "row"), generator)
    assert result.keep.tolist() == [[True, False, False, True]]
    assert result.notes == {"swaps": 1}
    assert torch.equal(DSnoT()(weight, stat, NofM(2, 4), generator).keep, result.keep)


def test_by_hand_as_published(generator: torch.Generator) -> None:
    # ε = 1 + 2 > 0: regrow the largest w·μ/σ² (column 1, 2/1), prune what has w·μ < 0 (column 2): ε = 3 - 2 - 2.
    stat = moments([1.0, 2.0, -2.0, 4.0], [1.0, 1.0, 2.0, 1.0])
    weight = torch.ones(1, 4)
    result = DSnoT(criterion="paper")(weight, stat, Unstructured(0.5, "row"), generator)
    assert result.keep.tolist() == [[False, True, False, True]]
    assert result.notes == {"swaps": 1}


@dataclass(frozen=True)
class Given:
    """An initial method that returns one row, updated weights and all."""

    row: tuple[float, ...]
    scope = "row"
    needs = None

    def __call__(self, weight: torch.Tensor, *_: object) -> Pruned:
        return Pruned.of(torch.tensor([self.row]), torch.tensor([self.row]) != 0)


def test_what_an_updated_weight_has_lost_counts_by_hand(generator: torch.Generator) -> None:
    # Means 0, variances 1, w = (2, 1½, 1.6), ŵ = (½, 0, 1.6): E = 2¼ + 2¼. Swapping 0 for 1 gives E = 4, and 1 for 0, now as
    # it was, E = 2¼.
    stat, weight = moments([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]), torch.tensor([[2.0, 1.5, 1.6]])
    method, pattern = DSnoT(Given((0.5, 0.0, 1.6)), max_cycles=1), Unstructured(1 / 3, "row")
    torch.testing.assert_close(method(weight, stat, pattern, generator).weight, torch.tensor([[0.0, 1.5, 1.6]]))
    method = DSnoT(Given((0.5, 0.0, 1.6)), max_cycles=2)
    torch.testing.assert_close(method(weight, stat, pattern, generator).weight, torch.tensor([[2.0, 0.0, 1.6]]))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("initial", INITIALS, ids=lambda initial: type(initial).__name__)
@pytest.mark.parametrize("seed", range(3))
def test_no_row_ends_with_a_larger_expected_error(
    initial: Pruner, pattern: Pattern, seed: int, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = correlated(32, 64, seed=seed)
    start, end = (method(weight, stat, pattern, generator) for method in (initial, DSnoT(initial)))
    before, after = (expected_error(weight, result.weight, stat) for result in (start, end))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("initial", INITIALS, ids=lambda initial: type(initial).__name__)
def test_the_published_rule_brings_the_mean_error_down(
    initial: Pruner, pattern: Pattern, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = correlated(32, 64)
    start, end = (method(weight, stat, pattern, generator) for method in (initial, DSnoT(initial, criterion="paper")))
    before, after = (mean_error(weight, result.weight, stat).abs() for result in (start, end))
    assert (after <= before + 1e-5).all()
    if isinstance(initial, (Wanda, Magnitude)):  # the others have brought it down themselves
        assert after.sum() < 0.75 * before.sum()


@pytest.mark.parametrize("criterion", ["expected", "paper"])
def test_rows_keep_the_counts_of_a_mask_over_the_whole_matrix(
    criterion: str, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = correlated(32, 64)
    weight *= torch.linspace(0.2, 2.0, 32)[:, None]
    pattern = Unstructured(0.6, "matrix")
    start = Magnitude()(weight, stat, pattern, generator)
    end = DSnoT(Magnitude(), criterion=criterion)(weight, stat, pattern, generator)  # pyright: ignore[reportArgumentType]
    assert torch.equal(start.keep.sum(dim=1), end.keep.sum(dim=1))
    assert not torch.equal(start.keep, end.keep)
    assert start.keep.sum(dim=1).unique().numel() > 5


@pytest.mark.parametrize("criterion", ["expected", "paper"])
def test_kept_weights_are_the_updated_ones_and_regrown_weights_the_original(
    criterion: str, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = correlated(32, 64)
    start = SparseGPT()(weight, stat, NofM(2, 4), generator)
    end = DSnoT(SparseGPT(), criterion=criterion)(weight, stat, NofM(2, 4), generator)  # pyright: ignore[reportArgumentType]
    stayed, regrown = end.keep & start.keep, end.keep & ~start.keep
    assert regrown.any()
    assert torch.equal(end.weight[regrown], weight[regrown])
    same = end.weight[stayed] == start.weight[stayed]
    assert (same | (end.weight[stayed] == weight[stayed])).all()
    assert same.float().mean() > 0.9


@pytest.mark.parametrize("criterion", ["expected", "paper"])
def test_cycles_bound_the_swaps_of_a_row(
    criterion: str, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = correlated(32, 64)
    pattern = Unstructured(0.5, "row")
    start = Wanda()(weight, stat, pattern, generator)
    for cycles in (0, 1, 3):
        method = DSnoT(max_cycles=cycles, criterion=criterion)  # pyright: ignore[reportArgumentType]
        end = method(weight, stat, pattern, generator)
        assert int((start.keep & ~end.keep).sum(dim=1).max()) <= cycles
        assert (end.notes["swaps"] == 0) == (cycles == 0)


def test_a_large_threshold_swaps_nothing_as_published(
    correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = correlated(32, 64)
    method = DSnoT(criterion="paper", update_threshold=1e6)
    assert method(weight, stat, Unstructured(0.5, "row"), generator).notes["swaps"] == 0


def test_notes_of_the_initial_method_are_passed_on(generator: torch.Generator) -> None:
    weight, stat = torch.randn(4, 64, generator=generator), Gram(64, torch.device("cpu"))
    stat.update(1000 * torch.randn(2, 64, generator=generator))
    assert set(DSnoT(SparseGPT(damp=1e-9))(weight, stat, NofM(2, 4), generator).notes) == {"damp", "swaps"}


def test_swaps_are_found_in_rows_wider_than_the_candidates(
    correlated: Callable[..., Layer], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, stat = correlated(16, 192)
    for pattern in (Unstructured(0.95, "row"), Unstructured(0.5, "row"), NofM(2, 4)):
        start = expected_error(weight, Wanda()(weight, stat, pattern, generator).weight, stat).sum()
        whole = expected_error(weight, DSnoT()(weight, stat, pattern, generator).weight, stat).sum()
        with monkeypatch.context() as patch:
            patch.setattr("llmsparse.pruners.dsnot.CANDIDATES", 24)
            few = expected_error(weight, DSnoT()(weight, stat, pattern, generator).weight, stat).sum()
        assert few < start
        assert start - few > 0.7 * (start - whole)


@pytest.mark.parametrize("options", [{"max_cycles": -1}, {"criterion": "papers"}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="max_cycles"):
        DSnoT(**options)  # pyright: ignore[reportArgumentType]
