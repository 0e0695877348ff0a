"""Random: a seed decides, and nothing else."""

from __future__ import annotations

import torch

from llmsparse.pruners import Random
from llmsparse.sparsity.patterns import NofM, Unstructured


def mask(seed: int, weight: torch.Tensor) -> torch.Tensor:
    return Random()(weight, None, Unstructured(0.5, "matrix"), torch.Generator().manual_seed(seed)).keep


def test_the_seed_decides_and_the_weights_do_not() -> None:
    ones, ramp = torch.ones(32, 32), torch.arange(1024.0).view(32, 32)
    assert torch.equal(mask(1, ones), mask(1, ramp))
    assert not torch.equal(mask(1, ones), mask(2, ones))


def test_every_weight_is_as_likely() -> None:
    kept = torch.stack([mask(seed, torch.ones(4, 8)) for seed in range(2000)]).float().mean(dim=0)
    assert ((kept - 0.5).abs() < 0.06).all()  # five standard deviations


def test_every_group_mask_occurs() -> None:
    generator = torch.Generator().manual_seed(0)
    keep = Random()(torch.ones(100, 40), None, NofM(2, 4), generator).keep
    assert len(keep.view(-1, 4).unique(dim=0)) == 6
