"""A layer with correlated inputs of unequal loudness, as language models have them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llmsparse.sparsity.stats import Gram

Layer = tuple[torch.Tensor, Gram]


@pytest.fixture(scope="session")
def correlated() -> Callable[..., Layer]:
    """`correlated(out, width, tokens, seed)` → a weight (out, width) and the Gram statistic of its input."""

    def make(out: int = 48, width: int = 64, tokens: int = 1024, seed: int = 0) -> Layer:
        generator = torch.Generator().manual_seed(seed)
        mixed = torch.randn(tokens, width // 3 + 1, generator=generator) @ torch.randn(
            width // 3 + 1, width, generator=generator
        )
        x = mixed + torch.randn(tokens, width, generator=generator) + 3 * torch.randn(width, generator=generator)
        x *= torch.exp(torch.randn(width, generator=generator) / 2)
        stat = Gram(width, torch.device("cpu"))
        stat.update(x)
        return torch.randn(out, width, generator=generator) / width**0.5, stat

    return make


@pytest.fixture(scope="session")
def layer_error() -> Callable[..., float]:
    """‖X Wᵀ - X Ŵᵀ‖² / ‖X Wᵀ‖², in float64 from the Gram matrix."""

    def measure(weight: torch.Tensor, pruned: torch.Tensor, stat: Gram) -> float:
        h, gap, dense = stat.xtx.double(), (weight - pruned).double(), weight.double()
        return float(((gap @ h) * gap).sum() / ((dense @ h) * dense).sum())

    return measure


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
