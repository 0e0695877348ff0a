from __future__ import annotations

import pytest
import torch

from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.oracle import Routing, greedy, routing_quality
from llmsparse.factorization.router import Router
from llmsparse.factorization.split import Split


def test_hand_worked_choice_looks_at_what_is_left() -> None:
    """The two largest outputs undo each other: with two to run, the oracle takes one of the small ones along."""
    outputs = torch.tensor([[[3.0, 0.0], [-2.9, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    assert greedy(outputs, 2).tolist() == [[False, False, True, True]]
    assert greedy(outputs, 4).all()


def test_first_choice_is_the_best_of_all() -> None:
    outputs = torch.randn(50, 5, 3, generator=torch.Generator().manual_seed(0))
    left = (outputs.sum(1, keepdim=True) - outputs).square().sum(-1)  # after running one expert
    assert torch.equal(greedy(outputs, 1).int().argmax(1), left.argmin(1))


def test_energies_and_load_of_a_router_that_always_takes_the_first() -> None:
    generator = torch.Generator().manual_seed(1)
    gate, up, down = torch.randn(3, 8, 4, generator=generator)
    ffn = FFN(gate, up, down.T.contiguous())
    split = Split(torch.empty(0, dtype=torch.int64), (torch.arange(4), torch.arange(4, 8)))
    router = Router(torch.zeros(2, 4), torch.tensor([1.0, 0.0]), "sigmoid", 1)
    x = torch.randn(64, 4, generator=generator)
    seen = routing_quality(ffn, ffn, split, router, [x[:40], x[40:]])
    missing = ffn.hidden(x)[:, 4:] @ ffn.down[:, 4:].T
    expected = 1 - missing.square().sum() / ffn(x).square().sum()
    assert (seen.captured, seen.unfitted) == pytest.approx((float(expected),) * 2, abs=1e-5)
    assert seen.oracle > seen.unfitted
    assert (seen.load, seen.dead, seen.entropy) == ((1.0, 0.0), 1, 0.0)


def test_entropy_of_equal_loads_is_one() -> None:
    assert Routing(1, 1, 1, (0.5, 0.5, 0.5, 0.5)).entropy == pytest.approx(1.0)
    assert Routing(1, 1, 1, (1.0,)).entropy == 1.0
