"""Column by column: numbers worked by hand, the paper's equations in numpy, and less error than rounding alone."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmsparse.pruners.sparsegpt import factor_hessian
from llmsparse.quantization.gptq import quantize_columns, refitted
from llmsparse.quantization.rounding import round_by, thresholds
from llmsparse.quantization.search import step_for
from llmsparse.quantization.weight import Problem
from llmsparse.sparsity.stats import Gram

nearest = partial(round_by, above=torch.full((128,), 0.5), most=127)


def gram_of(x: Tensor) -> Gram:
    gram = Gram(x.shape[1], torch.device("cpu"))
    gram.update(x)
    return gram


def problem(out: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    return torch.randn(out, width, generator=generator), torch.randn(300, width, generator=generator) @ mixed


def test_two_columns_worked_by_hand() -> None:
    """H = [[4, 2], [2, 3]]: column 0 loses 0.3, and column 1 takes H_01 / H_11 · 0.3 = 0.2 of it."""
    h = torch.tensor([[4.0, 2.0], [2.0, 3.0]])
    factor = torch.linalg.cholesky(h.flip(0, 1), upper=True).flip(0, 1)  # D M
    m = factor / factor.diagonal()[:, None]
    torch.testing.assert_close(m, torch.tensor([[1.0, 0.0], [2 / 3, 1.0]]))
    q = quantize_columns(torch.tensor([[1.3, 2.4]]), m, torch.ones(1, 1), 2, nearest)
    assert q.tolist() == [[1, 3]], "2.4 + 0.2 = 2.6 is nearer to 3, where 2.4 alone is 2"


def paper(weight: Tensor, gram: Gram, step: Tensor, damp: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Algorithm 1 with a block of one column: U = Cholesky(H⁻¹)ᵀ, W_j+1: -= (w_j - ŵ_j) / U_jj · U_j,j+1:."""
    h = gram.xtx.double().numpy()
    h = h + damp * np.diag(h).mean() * np.eye(len(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    w, each = weight.double().numpy().copy(), step.double().numpy()
    q = np.zeros_like(w)
    for j in range(w.shape[1]):
        q[:, j] = np.round(w[:, j] / each)
        error = (w[:, j] - q[:, j] * each) / u[j, j]
        w[:, j:] -= np.outer(error, u[j, j:])
    return q


def test_it_is_the_algorithm_of_the_paper() -> None:
    weight, x = problem(12, 200)
    gram, step = gram_of(x), torch.full((12,), 0.7)
    m, _, damp = factor_hessian(gram, 0.01)
    q = quantize_columns(weight, m, step[:, None], 200, nearest)
    wanted = paper(weight, gram, step, damp)
    assert (q.numpy() == wanted).mean() > 0.995, "but for what is a tie in one of two precisions"


def test_it_loses_less_than_rounding_alone_and_a_factor_a_row_loses_less_still() -> None:
    weight, x = problem(16, 64)
    gram = gram_of(x)
    m, _, _ = factor_hessian(gram, 0.01)
    steps = weight.square().mean(1, keepdim=True).sqrt()

    def lost(made: Tensor) -> float:
        return (x @ (weight - made).T).square().sum().item()

    made = quantize_columns(weight, m, steps, 64, nearest) * steps
    assert lost(made) < 0.8 * lost(nearest(weight / steps) * steps)
    factor = refitted(weight, made, gram.xtx)
    assert lost(made * factor[:, None]) < lost(made)
    moved = x.double() @ made.double().T
    best = (moved * (x.double() @ weight.double().T)).sum(0) / moved.square().sum(0)
    torch.testing.assert_close(factor.double(), best, rtol=1e-4, atol=1e-4)
    one = refitted(weight, made, gram.xtx, whole=True)
    assert lost(made * factor[:, None]) < lost(made * one[:, None]) < lost(made) and (one == one[0]).all()


def test_what_is_left_out_stays_zero_and_groups_have_steps_of_their_own() -> None:
    weight, x = problem(6, 32)
    keep = torch.rand(6, 32, generator=torch.Generator().manual_seed(1)) < 0.4
    m, _, _ = factor_hessian(gram_of(x), 0.01)
    steps = torch.rand(6, 4) + 0.2
    q = quantize_columns(weight * keep, m, steps, 8, nearest, keep)
    assert not q[~keep].any() and q[keep].any()
    free = quantize_columns(weight, torch.eye(32), steps, 8, nearest)
    assert torch.equal(free.float(), nearest(weight / steps.repeat_interleave(8, dim=1)))


@given(rate=st.sampled_from([0.02, 0.1, 0.3]), spread=st.floats(0.2, 4), seed=st.integers(0, 99))
def test_rounding_takes_the_cheaper_of_two_in_distortion_and_bits(rate: float, spread: float, seed: int) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(seed)) * spread
    above = thresholds(x, rate)
    count = torch.bincount(x.abs().round().long(), minlength=129).double() + 0.5
    share = count / count.sum()
    bits = -torch.cat((share[:1], share[1:] / 2)).log2()
    k = x.abs().floor().long()
    cost = torch.stack([(x.abs() - k - up).square() + rate * bits[k + up] for up in (0, 1)])
    cheaper = k + (cost[1] < cost[0])
    got = round_by(x, above, 127).abs()
    odd = (bits.diff()[k] > 4) | (bits.diff()[k] < 0)  # what is rare among the weights is not taken at its word
    assert torch.equal(got[~odd], cheaper[~odd].float()) and (above >= 0.5).all()


def test_rounding_keeps_signs_and_ends_where_it_is_told() -> None:
    got = round_by(torch.tensor([-3.6, -0.4, 0.0, 0.6, 200.0]), torch.full((128,), 0.5), 7)
    assert got.tolist() == [-4, 0, 0, 1, 7] and not got[1].signbit()


@pytest.mark.parametrize("wanted", [1.0, 2.3, 4.0])
def test_the_step_is_found_in_a_few_trials(wanted: float) -> None:
    tried: list[float] = []

    def attempt(step: float) -> tuple[float, None]:
        tried.append(step)
        return 2.1 - 0.9 * float(np.log2(step)) + 0.1 * step, None

    found = step_for(wanted, attempt, 1.2, least=0.01, most=6.0)
    assert abs(found.bits - wanted) < 0.005 and len(tried) <= 6
    assert step_for(20.0, attempt, 1.2, least=0.5, most=6.0).step == 0.5


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_of_a_tall_weight_are_solved_part_by_part_to_the_same_numbers(
    sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = problem(70, 32)
    if sparse:
        weight[:40, ::2] = 0  # of the last parts nothing is 0, of the first one half
    whole = Problem(weight, gram_of(x), 16, 0.0, 0.01).to_values(127)
    monkeypatch.setattr("llmsparse.quantization.weight.PART", 16)
    in_parts = Problem(weight, gram_of(x), 16, 0.0, 0.01).to_values(127)
    assert torch.equal(in_parts.q, whole.q) and torch.equal(in_parts.steps, whole.steps)
    assert not sparse or not in_parts.q[:40, ::2].any()


def test_the_last_parts_of_a_sparse_weight_keep_the_little_that_is_zero_in_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, x = problem(32, 32)
    weight[:16, ::2] = 0
    weight[16:, 8] = 0  # so few that by chance, if the part were all there is
    x[:, 8] = x[:, :8].sum(1)  # what the columns before it lose would go there
    monkeypatch.setattr("llmsparse.quantization.weight.PART", 16)
    assert not Problem(weight, gram_of(x), 32, 0.0, 0.01).to_values(7).q[16:, 8].any()
