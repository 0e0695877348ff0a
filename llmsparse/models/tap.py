"""See what a block multiplies each of its weights with, without knowing its modules.

One `TorchFunctionMode` watches the calls of torch: every matrix product with a watched parameter, or with one expert of
it, is reported. So Linear layers, GPT-2's Conv1D and fused experts are the same thing. Fused kernels that take
weights and do the product themselves are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from llmsparse.models.block import Block
    from llmsparse.models.weight import Slot

MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
OPERANDS = ("input", "mat1", "batch1", "weight", "mat2", "batch2", "other")
ADDMM = {torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm}


class Product(NamedTuple):
    """One product of activations with a watched parameter."""

    slot: Slot
    x: Tensor  # (..., tokens, in)
    transposed: bool  # the parameter is laid out (in, out)
    part: str = ""  # of a flat parameter: some of its "rows" (outputs) or "columns" (inputs); "" the whole of it


class Tap(TorchFunctionMode):
    """Context manager: while it is open, `on_input(slot, x)` gets the input of every weight of the block.

    x is (tokens, in) in the compute dtype; slot is (parameter name inside the block, expert or None). Each expert
    gets its own tokens only. x may be a view of a live activation: read it, never write or keep it uncopied.
    """

    def __init__(self, block: Block, on_input: Callable[[Slot, Tensor], None]) -> None:
        super().__init__()
        self._watched = Watched(block.module.named_parameters())
        self._on_input = on_input

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for product in self._watched.products(func, args, kwargs):
            if product.part != "columns":
                self._on_input(product.slot, product.x.reshape(-1, product.x.shape[-1]))
        return func(*args, **kwargs)


class Watched:
    """Parameters, recognised by their storage in whatever view they are used."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        self._by_storage: dict[int, tuple[str, Tensor, Any]] = {}
        for name, parameter in parameters:
            if parameter.dim() in (2, 3):
                storage = parameter.untyped_storage()  # held, so that its id stays its own
                self._by_storage.setdefault(id(storage), (name, parameter, storage))

    def products(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Product]:
        """The watched products that calling `func` will make."""
        if func is F.linear:
            x, weight = _operands(args, kwargs)[:2]
            yield from self._product(x, weight, out_first=True)
        elif func in MATMUL or func in ADDMM:
            left, right = _operands(args, kwargs)[func in ADDMM :][:2]
            yield from self._product(left, right, out_first=False)
            if right.dim() > 1:  # W @ x is (x.T @ W.T).T
                yield from self._product(right.transpose(-1, -2), left, out_first=True)
        elif func is torch.einsum and isinstance(args[0], str):
            yield from self._einsum(args[0], args[1:])

    def _product(self, x: Tensor, weight: Tensor, *, out_first: bool) -> Iterator[Product]:
        found = self._by_storage.get(id(weight.untyped_storage()))
        if found is None or weight.dim() not in (2, 3):
            return
        name, parameter, _ = found
        strides = weight.stride()[-2:]
        if strides not in (parameter.stride()[-2:], parameter.stride()[:-3:-1]):
            return  # not a matrix of it, but some other selection of its elements
        transposed = out_first != (strides == parameter.stride()[-2:])
        if x.shape[-1] != parameter.shape[-2 if transposed else -1]:
            if parameter.dim() == 2:
                yield Product((name, None), x, transposed, "columns")
        elif parameter.dim() == 2:
            yield Product((name, None), x, transposed, "" if weight.numel() == parameter.numel() else "rows")
        elif weight.dim() == 2:
            offset = int(weight.storage_offset()) - int(parameter.storage_offset())
            expert = offset // parameter.stride(0)
            yield Product((name, expert), x, transposed)
        elif x.dim() == 3 and x.shape[0] == weight.shape[0] == parameter.shape[0]:
            for expert, rows in enumerate(x):
                routed = rows if rows.is_meta else rows[rows.any(-1)]  # the tokens of other experts come as zeros
                yield Product((name, expert), routed, transposed)

    def _einsum(self, equation: str, operands: tuple[Any, ...]) -> Iterator[Product]:
        """`x, weight -> y` in either order, with or without an expert letter in front of the weight's."""
        inputs, _, output = equation.replace(" ", "").partition("->")
        letters = inputs.split(",")
        if len(operands) != 2 or len(letters) != 2:
            return
        for one, other in ((0, 1), (1, 0)):
            x, x_letters, weight, w_letters = operands[one], letters[one], operands[other], letters[other]
            contracted = [letter for letter in w_letters[-2:] if letter in x_letters and letter not in output]
            if len(contracted) != 1 or "." in w_letters:
                continue
            place = x_letters.index(contracted[0]) - (len(x_letters) if x_letters.startswith("...") else 0)
            rows = x.movedim(place, -1)
            if len(w_letters) == 3 and w_letters[0] in x_letters:
                rows = rows.movedim(x_letters.replace(contracted[0], "").index(w_letters[0]), 0)
            elif len(w_letters) == 3:
                rows = rows.expand(weight.shape[0], *rows.shape)
            yield from self._product(rows, weight, out_first=w_letters[-1] == contracted[0])


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Positional and named operands in the order of the positional ones; bias, alpha and such are not among them."""
    return [*args, *(kwargs[name] for name in OPERANDS if name in kwargs)]
