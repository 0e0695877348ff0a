from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from llmsparse.backends import BACKENDS, WeightSpec, cpu
from llmsparse.backends.choice import choose_backend
from llmsparse.backends.cpu_bitmask import SCRATCH
from llmsparse.formats.bitmask import Bitmask
from llmsparse.inference.linear import PackedMatrix

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
BACKEND = BACKENDS["cpu-bitmask"]


def matrix(out: int = 40, width: int = 96, seed: int = 0) -> tuple[torch.Tensor, PackedMatrix]:
    """A weight (out, in), and the same in the hands of the backend."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator) * (torch.rand(out, width, generator=generator) > 0.7)
    packed = Bitmask.pack(weight)
    return weight, PackedMatrix(packed, choose_backend("w", WeightSpec.of(packed), 0, backend="cpu-bitmask"))


@pytest.mark.parametrize("tokens", [1, 4, 5, 24, 25, 50])
def test_any_number_of_tokens_gives_the_product(tokens: int) -> None:
    weight, held = matrix()
    x, bias = torch.randn(2, tokens, 96), torch.randn(40)
    with torch.no_grad():
        torch.testing.assert_close(held(x, bias), functional.linear(x, weight, bias))


def test_a_token_gives_the_same_bits_alone_and_among_sixteen() -> None:
    _, held = matrix()
    x = torch.randn(16, 96)
    alone = torch.cat([held(row[None], None) for row in x])
    assert torch.equal(held(x, None), alone)


def test_unpacking_for_a_product_uses_one_buffer_and_for_a_reader_another() -> None:
    weight, held = matrix()
    other, second = matrix(out=24, seed=1)
    kept = held.dense()
    with torch.no_grad():
        first = BACKEND.borrow(held.prepared)
        assert torch.equal(first, weight)
        assert BACKEND.borrow(second.prepared).data_ptr() == first.data_ptr() == SCRATCH.memory.data_ptr()
    assert torch.equal(kept, weight) and torch.equal(second.dense(), other)


@pytest.mark.parametrize("tokens", [2, 100])
def test_a_gradient_flows_and_what_autograd_keeps_is_not_overwritten(tokens: int) -> None:
    weight, held = matrix()
    x = torch.randn(tokens, 96, requires_grad=True)
    y = held(x, None)
    with torch.no_grad():
        matrix(seed=1)[1](torch.randn(200, 96), None)  # unpacks into the buffer
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(tokens, -1))
