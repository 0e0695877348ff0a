"""What a packed layer hands out as its weight can be read in any way and written to in none."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from sparse import one_line
from torch import Tensor, nn
from torch.nn import functional

from llmsparse.errors import RecipeError
from llmsparse.inference.read_only import ReadOnly, read_only


def weight() -> Tensor:
    return torch.arange(6.0).view(2, 3)


def set_data(w: Tensor) -> None:
    w.data = torch.zeros(2, 3)


def add_to_data(w: Tensor) -> None:
    w.data += 1


def set_row(w: Tensor) -> None:
    w[0] = 0


def add(w: Tensor) -> None:
    w += 1


def set_view(w: Tensor) -> None:
    w.T[0, 1:].zero_()


def through_out(w: Tensor) -> None:
    torch.add(torch.ones(2, 3), 1, out=w)


def train(w: Tensor) -> None:
    w.requires_grad = True


WRITES: list[Callable[[Tensor], object]] = [
    set_data,
    add_to_data,
    set_row,
    add,
    set_view,
    through_out,
    train,
    lambda w: w.copy_(torch.zeros(2, 3)),
    lambda w: w.detach().mul_(2),
    lambda w: w.float().mul_(2),  # the same memory: it is float already
    lambda w: w.view(-1).fill_(1),
    lambda w: w.unbind()[0].zero_(),
    lambda w: torch.relu_(w),
    lambda w: functional.relu(w, inplace=True),
    lambda w: nn.init.normal_(w),
    lambda w: nn.init.xavier_uniform_(w),
    lambda w: nn.init.constant_(w, 3),
    lambda w: torch._foreach_mul_([w], 2),
    lambda w: w.requires_grad_(),
]


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_an_edit_is_refused_and_changes_nothing(write: Callable[[Tensor], object]) -> None:
    held = weight()
    with pytest.raises(RecipeError, match=r"edit of its weight would be lost.*dequantize") as caught:
        write(read_only(held))
    one_line(caught.value)
    assert torch.equal(held, weight())


def test_reading_gives_ordinary_tensors() -> None:
    w, x = read_only(weight()), torch.ones(4, 3, requires_grad=True)
    y = functional.linear(x, w)
    y.sum().backward()
    assert type(y) is type(w + 1) is type(w.clone()) is type(w.double()) is type(copy.deepcopy(w)) is Tensor
    assert torch.equal(y.detach(), functional.linear(x.detach(), weight()))
    assert x.grad is not None and torch.equal(x.grad, weight().sum(0).expand(4, 3))
    assert (w.shape, w.dtype, w.is_contiguous(), w.numel()) == ((2, 3), torch.float32, True, 6)
    assert torch.equal(w, weight()) and w.tolist() == weight().tolist() and isinstance(w.T, ReadOnly)
    copied = w.clone()
    copied[0] = 7  # a copy may be written to
    assert torch.equal(w, weight())


def test_it_is_stored_as_the_tensor_that_it_is() -> None:
    stored = io.BytesIO()
    torch.save({"w": read_only(weight())}, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)["w"]
    assert type(loaded) is Tensor and torch.equal(loaded, weight())


def test_it_may_be_written_from() -> None:
    other = torch.zeros(2, 3)
    other.copy_(read_only(weight()))
    other += read_only(weight())
    assert torch.equal(other, 2 * weight())
