"""What a model does with its parameters, learned by running it without their values.

Matrices stay on meta while activations are real: a call of torch that mixes the two is made on meta, and its result
is zeros of the right shape. That takes no memory and next to no time, and shows which parameters are multiplied with
activations and how they are laid out, square ones too, and what container the blocks return. Names, classes and
annotations, which lie, are not asked.

It also shows whether a model can be streamed at all. With NaN in the place of the embedding, or of what the blocks
return, everything that depends on these becomes NaN: nothing but a block's hidden states may.
"""

# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from llmsparse.errors import CheckpointError, LlmsparseError, one_line
from llmsparse.models.activations import split_call, tensors_in
from llmsparse.models.block import unwrap
from llmsparse.models.choices import Choices
from llmsparse.models.empty_model import assign, drop, quiet, replaced
from llmsparse.models.tap import Watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 8
SMALL = 2**20  # elements
HANDED_ON = "gives a block more of an earlier one than hidden states"


@dataclass
class MetaRun:
    """The parameters that are multiplied with activations, and the container that blocks return."""

    transposed: dict[str, bool] = field(default_factory=dict[str, bool])  # parameter → laid out (in, out); call order
    container: type[tuple[Any, ...]] | type[list[Any]] | None = None  # that a block returns, if not a bare tensor
    items: int = 1  # in it
    routers: set[str] = field(default_factory=set[str])  # parameters that only choose, see choices.py
    parts: set[str] = field(default_factory=set[str])  # flat parameters that are multiplied with part by part
    idle: set[str] = field(
        default_factory=set[str]
    )  # modules beside the decoder that text does not run, towers for images

    @property
    def kinds(self) -> dict[str, str]:
        """Parameter → kind of the matrices that are no ordinary ones."""
        return dict.fromkeys(self.routers, "router") | dict.fromkeys(self.parts, "parts")

    def wrap(self, hidden: Tensor) -> Any:
        """Hidden states as a block would return them."""
        return hidden if self.container is None else self.container([hidden, *[None] * (self.items - 1)])


@torch.no_grad()
def run_on_meta(model: PreTrainedModel, blocks: Sequence[nn.Module], device: torch.device) -> MetaRun:
    """Learn it from a few tokens on a model whose parameters are on meta.

    Raises CheckpointError for a model that is more than a stack of blocks: streaming would lose what passes it by.
    """
    found = MetaRun()
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)

    beside: list[Tensor] = []  # what blocks return beside hidden states

    def watch(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = split_call(args, kwargs)[1]
            _require(model, not _share(beside, tensors_in((call.args, call.kwargs))), HANDED_ON)
            zeros.choices = Choices()
            output = forward(*args, **kwargs)
            found.routers |= zeros.choices.routers(unwrap(output))
            zeros.choices = None
            if not isinstance(output, Tensor):
                found.container, found.items = type(output), len(output)
                beside.extend(tensors_in(output[1:]))
            return output

        return run

    with quiet(), _real_coefficients(model, device), _Zeros(model, found, device) as zeros:
        with replaced(blocks, watch), _ran() as ran:
            _try_out(model, ids)
        found.idle = set(_idle(model, ran))
        for poisoned in ("embedding", "blocks"):
            with _stubbed(model, blocks, found, poisoned):
                logits = model(ids, use_cache=False).logits
            _require(
                model, not logits.isnan().any(), f"computes its logits from the {poisoned} past the last block too"
            )
    names = [name for name, _ in model.named_parameters()]
    found.transposed = _spread(found.transposed, names)
    found.routers = set(_spread(dict.fromkeys(found.routers, True), names))
    found.parts = set(_spread(dict.fromkeys(found.parts, True), names))
    return found


@contextmanager
def _ran() -> Generator[set[nn.Module]]:
    """Within it, modules that run are collected."""
    seen: set[nn.Module] = set()

    def note(module: nn.Module, args: Any) -> None:
        seen.add(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _idle(model: PreTrainedModel, ran: set[nn.Module]) -> Iterator[str]:
    """Names of the largest modules outside the decoder in which nothing ran."""
    decoder = model.get_decoder()

    def walk(name: str, module: nn.Module) -> Iterator[str]:
        for child, inside in module.named_children():
            path = f"{name}.{child}" if name else child
            if decoder in (parts := set(inside.modules())) and inside is not decoder:
                yield from walk(path, inside)
            elif inside is not decoder and not parts & ran:
                yield path

    return walk("", model)


def _try_out(model: PreTrainedModel, ids: Tensor) -> None:
    """Run it for the first time. A config that contradicts itself shows here, in whatever way the model's code has."""
    try:
        model(ids, use_cache=False)
    except (LlmsparseError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{model.config.name_or_path or 'config.json'}: {type(model).__name__} does not run with the sizes in its "
            f"config.json: {one_line(error)}; check that transformers alone runs it"
        ) from error


def _spread(transposed: dict[str, bool], names: Sequence[str]) -> dict[str, bool]:
    """What holds for one of a numbered series holds for all: zeros visit only a few of the experts."""
    series = {_series(name): flag for name, flag in transposed.items()}
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(_series(name), []).append(name)
    return {name: flag for one, flag in series.items() for name in members[one]}


def _series(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


@contextmanager
def _stubbed(model: PreTrainedModel, blocks: Sequence[nn.Module], found: MetaRun, poisoned: str) -> Generator[None]:
    """Within it blocks do not run; NaN stands for the embedding, or for what all blocks but the last return."""
    returned: list[Tensor] = []

    def embed(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: torch.full_like(forward(*args, **kwargs), _nan(poisoned == "embedding"))

    def stub(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, call = split_call(args, kwargs)
            shape = list(hidden.shape)
            _require(model, shape[:2] == [1, TOKENS], f"gives {shape} to its blocks for (1, {TOKENS}) tokens")
            _require(model, not returned or hidden is returned[0], "changes the hidden states between its blocks")
            passed = any(tensor.isnan().any() for tensor in tensors_in((call.args, call.kwargs)))
            _require(model, poisoned != "blocks" or not passed, HANDED_ON)
            returned[:] = [torch.full_like(hidden, _nan(poisoned == "blocks" and index < len(blocks) - 1))]
            return found.wrap(returned[0])

        return run

    with replaced([model.get_input_embeddings()], embed), replaced(blocks, stub):
        yield


@contextmanager
def _real_coefficients(model: nn.Module, device: torch.device) -> Generator[None]:
    """Within it, what is no matrix is real zeros: scales, biases, convolutions, small tables. Kernels that are no calls
    of torch (causal-conv1d, mamba-ssm) take these, and cannot take meta."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            table = parameter.dim() == 2 and parameter.numel() <= SMALL and any(True for _ in module.children())
            if parameter.dim() < 2 or table or isinstance(module, nn.Conv1d):
                assign(model, name, torch.zeros(parameter.shape, dtype=parameter.dtype, device=device))
    try:
        yield
    finally:
        drop(model)


def _share(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether any two of them lie in the same memory."""
    places = {tensor.untyped_storage()._cdata for tensor in some}  # pyright: ignore[reportPrivateUsage]
    return any(tensor.untyped_storage()._cdata in places for tensor in others)  # pyright: ignore[reportPrivateUsage]


def _nan(poisoned: bool) -> float:
    return float("nan") if poisoned else 1.0


def _require(model: nn.Module, condition: bool | Tensor, fault: str) -> None:
    if not condition:
        raise CheckpointError(f"{type(model).__name__} {fault}; only a plain stack of blocks can be pruned")


class _Zeros(TorchFunctionMode):
    """Matrices are on meta, everything else is real: calls that mix them return zeros, or NaN where one goes in."""

    def __init__(self, model: nn.Module, result: MetaRun, device: torch.device) -> None:
        super().__init__()
        self._watched = Watched(model.named_parameters())
        self._result = result
        self._device = device
        self.choices: Choices | None = None  # of the block that is running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        products = list(self._watched.products(func, args, kwargs))
        for product in products:
            if product.part:
                self._result.parts.add(product.slot[0])
            if product.part != "columns":
                self._result.transposed[product.slot[0]] = product.transposed
        result = self._call(func, args, kwargs)
        if self.choices is not None:
            names = {product.slot[0] for product in products}
            self.choices.note(func, names, tensors_in((args, kwargs)), list(tensors_in(result)))
        return result

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if _on_meta(kwargs.get("device")):
            kwargs["device"] = self._device  # models create things where a parameter of theirs is
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if all(tensor.is_meta for tensor in tensors) or (func is Tensor.__getitem__ and args[0].is_meta):
            return func(*args, **kwargs)  # of a parameter alone; one expert of it, even if its number is real
        fill = 0.0
        if any(tensor.is_meta for tensor in tensors):
            fill = float("nan") if any(not tensor.is_meta and tensor.isnan().any() for tensor in tensors) else 0.0
            args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return pytree.tree_map_only(Tensor, lambda tensor: self._real(tensor, fill), func(*args, **kwargs))

    def _real(self, tensor: Tensor, fill: float) -> Tensor:
        if not tensor.is_meta:
            return tensor
        fill = fill if tensor.is_floating_point() else 0
        return torch.full(tensor.shape, fill, dtype=tensor.dtype, device=self._device)


def _on_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"
