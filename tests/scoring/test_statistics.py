"""Sums over tokens, held against the same written out in numpy, and texts that add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmsparse.scoring.statistics import SUMS, ExpertStatistics, blend

INDEX = torch.tensor([[0, 1], [1, 2], [0, 1]])  # three tokens, two of four experts each
GATES = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.5]])
NORMS = torch.tensor([[2.0, 4.0], [1.0, 3.0], [3.0, 2.0]])


def measured(*tokens: int) -> ExpertStatistics:
    sums = ExpertStatistics.empty(4)
    rows = list(tokens)
    sums.add(INDEX[rows], GATES[rows], NORMS[rows])
    return sums


def test_sums_are_those_worked_out_by_hand() -> None:
    sums = measured(0, 1, 2)
    assert sums.seen == 3
    assert sums.tokens.tolist() == [2, 3, 1, 0]
    assert sums.gates.tolist() == [1.75, 1.25, 0.5, 0]
    assert sums.outputs.tolist() == [5, 7, 3, 0]
    assert sums.additions.tolist() == [1.5 + 3, 1 + 0.5 + 1, 1.5, 0]
    assert sums.peak.tolist() == [3, 4, 3, 0]
    # g‖f‖ of a token's two experts: (1.5, 1), (0.5, 1.5), (3, 1)
    assert sums.pairs.tolist() == [
        [1.5**2 + 3**2, 1.5 * 1 + 3 * 1, 0, 0],
        [1.5 * 1 + 3 * 1, 1**2 + 0.5**2 + 1**2, 0.5 * 1.5, 0],
        [0, 0.5 * 1.5, 1.5**2, 0],
        [0, 0, 0, 0],
    ]
    assert {getattr(sums, name).dtype for name in SUMS} == {torch.float64}


def test_sums_are_numpys_on_random_routing() -> None:
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(200)])
    gates, norms = torch.rand(200, 3, generator=generator), 9 * torch.rand(200, 3, generator=generator)
    sums = ExpertStatistics.empty(7)
    for rows in torch.arange(200).split(64):
        sums.add(index[rows], gates[rows], norms[rows])
    g, f = np.zeros((200, 7)), np.zeros((200, 7))
    np.put_along_axis(g, index.numpy(), gates.numpy().astype(np.float64), 1)
    np.put_along_axis(f, index.numpy(), norms.numpy().astype(np.float64), 1)
    wanted = {"tokens": (f > 0).sum(0), "gates": g.sum(0), "outputs": f.sum(0), "additions": (g * f).sum(0)}
    wanted |= {"pairs": (g * f).T @ (g * f), "peak": f.max(0)}
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(sums, name).numpy(), value, rtol=1e-12)


def test_a_number_beyond_the_last_expert_is_none() -> None:
    sums = ExpertStatistics.empty(2)
    sums.add(torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[2.0, 8.0]]))
    assert sums.tokens.tolist() == [1, 0] and sums.outputs.tolist() == [2, 0] and sums.peak.tolist() == [2, 0]


def test_texts_measured_apart_add_up_to_what_they_are_together() -> None:
    together, parts = measured(0, 1, 2), measured(0).plus(measured(1, 2))
    assert parts.seen == together.seen
    for name in (*SUMS, "peak"):
        assert torch.equal(getattr(parts, name), getattr(together, name))


def test_a_blend_goes_by_weight_however_long_the_texts_are() -> None:
    short, long = measured(0), measured(1, 2)
    even = blend({"short": short, "long": long})
    assert even.additions.tolist() == pytest.approx((short.additions + long.additions / 2).tolist())
    tilted = blend({"short": short, "long": long}, {"short": 3.0, "long": 1.0})
    assert tilted.pairs.flatten().tolist() == pytest.approx((3 * short.pairs + long.pairs / 2).flatten().tolist())
    alone = blend({"short": short, "long": long}, {"long": 5.0})
    assert alone.tokens.tolist() == pytest.approx([2.5, 5, 2.5, 0])
