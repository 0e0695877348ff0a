"""Wanda: |W_ij| · ‖X_j‖₂, compared within a row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from llmsparse.pruners import Wanda
from llmsparse.sparsity.patterns import NofM, Unstructured
from llmsparse.sparsity.stats import Gram, InputNorm

WEIGHT = torch.tensor([[4.0, 1.0, -1.0, 0.5], [3.0, -2.0, 1.0, 1.0]])
INPUTS = torch.tensor([[0.0, 3.0, 1.0, 2.0], [1.0, 4.0, 0.0, 2.0]])  # norms 1, 5, 1, √8


def statistic() -> InputNorm:
    stat = InputNorm(4, torch.device("cpu"))
    stat.update(INPUTS)
    return stat


def test_by_hand(generator: torch.Generator) -> None:
    # scores: 4, 5, 1, √2 and 3, 10, 1, √8
    result = Wanda()(WEIGHT, statistic(), Unstructured(0.5, "row"), generator)
    assert result.weight.tolist() == [[4.0, 1.0, 0.0, 0.0], [3.0, -2.0, 0.0, 0.0]]
    assert torch.equal(Wanda()(WEIGHT, statistic(), NofM(2, 4), generator).weight, result.weight)


def test_by_hand_over_the_whole_matrix(generator: torch.Generator) -> None:
    result = Wanda()(WEIGHT, statistic(), Unstructured(0.625, "matrix"), generator)
    assert result.weight.tolist() == [[4.0, 1.0, 0.0, 0.0], [0.0, -2.0, 0.0, 0.0]]


def test_keeps_small_weights_on_loud_inputs(generator: torch.Generator) -> None:
    weight = torch.full((3, 8), 1.0)
    weight[:, 5] = 0.01
    stat, x = InputNorm(8, torch.device("cpu")), torch.ones(10, 8)
    x[:, 5] = 1000.0
    stat.update(x)
    assert Wanda()(weight, stat, Unstructured(0.875, "row"), generator).keep.nonzero()[:, 1].tolist() == [5, 5, 5]


def test_equals_the_paper_in_numpy(
    correlated: Callable[..., tuple[torch.Tensor, Gram]], generator: torch.Generator
) -> None:
    weight, stat = correlated(32, 64)
    score = np.abs(weight.numpy()) * np.sqrt(stat.xtx.diagonal().double().numpy())
    cut = np.sort(score, axis=1)[:, 64 * 6 // 10, None]
    np.testing.assert_array_equal(
        Wanda()(weight, stat, Unstructured(38 / 64, "row"), generator).keep.numpy(), score >= cut
    )
