"""One block of a model, loaded: what is stored on disk, the module that runs it, and the weights that are pruned.

Weights are pruned in the disk's space, where every matrix has a name, a shape and a dtype of its own; the module is
filled from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmsparse.errors import CheckpointError, NumericalError
from llmsparse.models.activations import Activations
from llmsparse.models.empty_model import drop
from llmsparse.models.naming import Naming
from llmsparse.models.weight import Weight

if TYPE_CHECKING:
    from llmsparse.models.tap import Tap


class Block:
    """A block with its weights loaded."""

    def __init__(
        self,
        name: str,
        index: int,
        module: nn.Module,
        weights: list[Weight],
        stored: dict[str, Tensor],
        *,
        naming: Naming,
        prefix: str,
        device: torch.device,
        fill: Callable[[Mapping[str, Tensor]], None],
    ) -> None:
        self.name = name
        self.index = index
        self.module = module  # parameters real, in the compute dtype, on the device
        self.weights = weights
        self.stored = stored  # on-disk key → tensor, on the CPU: the truth, of which the module is a copy
        self._naming = naming
        self._prefix = prefix
        self._device = device
        self._fill = fill
        self.reload()

    def view(self, weight: Weight, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The (out, in) matrix of a weight, a view into `stored` or into other on-disk tensors of the same shapes."""
        return weight.view(self.stored if tensors is None else tensors)

    def store(self, weight: Weight, values: Tensor) -> int:
        """Round (out, in) values, where they are, to the stored dtype and put them into `stored`; -0.0 becomes +0.0.

        Returns how many are not 0 as stored. NumericalError for a value that this dtype does not reach.
        """
        view = self.view(weight)
        rounded = values.to(view.dtype) + 0  # -0.0 + 0 is +0.0
        if not bool(rounded.isfinite().all()):
            name = str(view.dtype).removeprefix("torch.")
            raise NumericalError(
                f"{weight.name}: the update made it {values.abs().max().item():g}, which {name}, that it is stored in, "
                f"does not reach; use --match-steps 0, method wanda, or a checkpoint in bfloat16 or float32"
            )
        view.copy_(rounded)
        return int(rounded.count_nonzero())

    def reload(self, keys: Collection[str] | None = None) -> None:
        """Fill the module from `stored` again: all of it, or what these on-disk keys are part of."""
        if keys is None:
            self._fill(self.stored)
            return
        whole = {
            key
            for group in self._naming.groups.values()
            if any(key in keys for key in group.keys)
            for key in group.keys
        }
        self._fill({key: self.stored[key] for key in self.stored if key in whole})

    def in_module(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameter name → tensor for on-disk tensors of any dtype; all tensors that make up a parameter are needed."""
        return {name.removeprefix(self._prefix): tensor for name, tensor in self._naming.to_module(tensors)}

    def on_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On-disk key → tensor for parameters of any dtype: the reverse of `in_module`."""
        return self._naming.to_disk({self._prefix + name: tensor for name, tensor in tensors.items()})

    def call(self, acts: Activations, batch: int, hidden: Tensor | None = None) -> Tensor:
        """The block's output (batch, tokens, width) for one batch, or for other hidden states in its place."""
        hidden = acts.hidden[batch] if hidden is None else hidden
        args, kwargs = acts.calls[self.index][batch].bind(hidden.to(self._device))
        return unwrap(self.module(*args, **kwargs))

    @torch.no_grad()
    def run(self, acts: Activations, tap: Tap | None = None, *, into: Activations | None = None) -> Activations:
        """The block's outputs for all batches, each on the device of its input; `into` may be `acts` itself."""
        outputs = [None] * len(acts.hidden) if into is None else into.hidden
        with tap or nullcontext():
            for batch, hidden in enumerate(acts.hidden):
                outputs[batch] = self.call(acts, batch).to(hidden.device)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return acts.like(outputs) if into is None else into  # pyright: ignore[reportArgumentType]

    def evict(self) -> None:
        """Let go of all weights; the module is back on meta."""
        drop(self.module)
        self.stored = {}


class Head(Block):
    """The untied output head as a last pseudo-block: what enters it can be seen, nothing comes after it."""

    entering: Callable[[Tensor], Tensor]  # hidden states after the last block → what the head is called with

    def call(self, acts: Activations, batch: int, hidden: Tensor | None = None) -> Tensor:
        """What enters the head, (batch, tokens, width). A Tap sees it; the logits themselves are not computed."""
        entering = self.entering((acts.hidden[batch] if hidden is None else hidden).to(self._device))
        F.linear(entering, self.module.get_parameter("weight")[:1])  # one row is enough to show a Tap its input
        return entering

    def run(self, acts: Activations, tap: Tap | None = None, *, into: Activations | None = None) -> Activations:
        """Feeds the Tap; the hidden states are returned as they are."""
        with torch.no_grad(), tap or nullcontext():
            for batch in range(len(acts.hidden)):
                self.call(acts, batch)
        return acts

    def evict(self) -> None:
        """Forget what is stored; the module stays filled, for `logits`."""
        self.stored = {}


def unwrap(output: Any) -> Tensor:
    """The hidden states in what a block returns: a tensor, or a tuple or list that begins with it."""
    items: Any = output
    first = items[0] if isinstance(output, tuple | list) and output else items
    if not isinstance(first, Tensor):
        raise CheckpointError(
            f"the blocks return {type(items).__name__}, not hidden states; only a plain stack of blocks can be pruned"
        )
    return first
