"""Magnitude: the smallest absolute values go."""

from __future__ import annotations

import torch

from llmsparse.pruners import Magnitude
from llmsparse.sparsity.patterns import NofM, Unstructured

WEIGHT = torch.tensor([[1.0, -4.0, 3.0, -0.5], [8.0, -2.0, 6.0, 7.0]])


def test_by_hand_over_the_whole_matrix(generator: torch.Generator) -> None:
    result = Magnitude()(WEIGHT, None, Unstructured(0.5, "matrix"), generator)
    assert result.weight.tolist() == [[0.0, -4.0, 0.0, 0.0], [8.0, 0.0, 6.0, 7.0]]
    assert result.notes == {}


def test_by_hand_2_of_4(generator: torch.Generator) -> None:
    result = Magnitude()(WEIGHT, None, NofM(2, 4), generator)
    assert result.weight.tolist() == [[0.0, -4.0, 3.0, 0.0], [8.0, 0.0, 0.0, 7.0]]


def test_equal_magnitudes_go_in_order(generator: torch.Generator) -> None:
    result = Magnitude()(torch.tensor([[1.0, -1.0, 1.0, -1.0]]), None, Unstructured(0.25, "matrix"), generator)
    assert result.weight.tolist() == [[0.0, -1.0, 1.0, -1.0]]
