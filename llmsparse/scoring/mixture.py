"""Where the routed experts of a block are, and what each does with each token: seen while the block runs.

Nothing is known of architectures. A module that holds three-dimensional expert parameters is called in one of two ways:
with tokens, the numbers of the experts that each is sent to, and gates, which weigh what experts give; or with the
tokens of all experts one after the other, weighed beforehand, zeros where a token is not sent. Either way the module's
own code computes f, whatever it does with biases and clamps.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.models.empty_model import replaced
from llmsparse.models.streamed import Block, StreamedModel


@dataclass(frozen=True)
class Mixture:
    """The routed experts of one block."""

    path: str  # of the module that runs them, inside the block
    experts: int
    parameters: tuple[
        str, ...
    ]  # three-dimensional ones, inside the block, as they are multiplied with: the last gives f
    weighs_inputs: bool  # gates are on what goes into experts, not on what comes out

    @property
    def down(self) -> str:
        """The parameter that gives the output."""
        return self.parameters[-1]


@dataclass(frozen=True)
class Routed:
    """Some tokens in the experts of a block. A token that is sent to fewer experts has numbers beyond the last one."""

    index: Tensor  # (tokens, k) numbers of experts
    gates: Tensor  # (tokens, k)
    norms: Tensor  # (tokens, k) ‖f‖
    output: Tensor  # (tokens, width) what the experts give together
    returned: Tensor  # what the module would return


class Call(ABC):
    """One call of the experts of a block, not carried out yet."""

    def __init__(self, own: Callable[..., Tensor], experts: int, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        self._own, self._experts, self._hidden = own, experts, hidden
        self.index, self.gates = index, gates  # as of Routed

    @abstractmethod
    def observe(self) -> Routed:
        """Carry it out, once, and see what each expert gives."""

    @abstractmethod
    def sent(self, expert: int) -> Sent:
        """The tokens that are sent to one expert."""

    @abstractmethod
    def run(self, expert: int, tokens: Tensor) -> Tensor:
        """What one expert gives, (some, width), for some of the tokens that are sent to it; as often as is asked."""

    @classmethod
    def joined(cls, calls: Sequence[Call]) -> Call:
        """The tokens of all calls in one, in their order, to run single experts on."""
        most = max(call.index.shape[1] for call in calls)
        whole, last = copy.copy(calls[0]), calls[0]._experts
        whole._hidden = torch.cat([call._hidden for call in calls])
        whole.index = torch.cat([F.pad(call.index, (0, most - call.index.shape[1]), value=last) for call in calls])
        whole.gates = torch.cat([F.pad(call.gates, (0, most - call.gates.shape[1])) for call in calls])
        return whole


class Sent(NamedTuple):
    """Tokens that are sent to one expert: it adds weights · output to them."""

    tokens: Tensor  # (some,)
    weights: Tensor  # (some,) gates, where these are on what comes out; else ones


def find_mixture(model: StreamedModel, index: int) -> Mixture | None:
    """The routed experts of block `index`, None where it has none. CheckpointError for those that cannot be watched."""
    names = list(dict.fromkeys(weight.slot[0] for weight in model.weights(index) if weight.kind == "expert"))
    if not names:
        return None
    where, block = model.folder, model.block_names[index]
    paths = {name.rpartition(".")[0] for name in names}
    if len(paths) > 1:
        raise CheckpointError(f"{where}: {block} has experts in {len(paths)} places, {min(paths)} first; wanted one")
    path = paths.pop()
    module = model.module(index, path)
    wanted = [
        name
        for name, parameter in inspect.signature(type(module).forward).parameters.items()
        if name != "self" and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(wanted) not in (1, 3):
        raise CheckpointError(
            f"{where}: the experts of {block} take {', '.join(wanted)}; wanted tokens, or tokens, experts and gates; "
            f"{model.config.model_type} cannot be watched"
        )
    counts = {model.shapes[f"{block}.{name}"][0] for name in names}
    if len(counts) > 1:
        raise CheckpointError(f"{where}: {block} has {min(counts)} experts and {max(counts)}; wanted one number")
    return Mixture(path, counts.pop(), tuple(names), len(wanted) == 1)


@contextmanager
def intercepted(block: Block, mixture: Mixture, handle: Callable[[Call], Tensor]) -> Generator[None]:
    """Within it `handle` gets every call of the block's experts, and gives what the module shall return."""
    experts = block.module.get_submodule(mixture.path)
    around = block.module.get_submodule(mixture.path.rpartition(".")[0])
    entering: list[Tensor] = []

    def keep(_: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            entering[:] = [hidden.reshape(-1, hidden.shape[-1])]
            return own(hidden, *args, **kwargs)

        return run

    def take(_: int, own: Callable[..., Any]) -> Callable[..., Any]:
        if mixture.weighs_inputs:
            return lambda weighed: handle(_WeighedInputs(own, mixture.experts, weighed, entering[0]))  # pyright: ignore[reportUnknownLambdaType]
        return lambda *args, **kwargs: handle(_WeighedOutputs(own, mixture.experts, *args, *kwargs.values()))

    with replaced([around] * mixture.weighs_inputs, keep), replaced([experts], take):
        yield


class _WeighedOutputs(Call):
    """Tokens, the experts that each is sent to, and gates on what these give."""

    def __init__(self, own: Callable[..., Tensor], experts: int, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        if index.is_floating_point():
            index, gates = gates, index
        super().__init__(own, experts, hidden, index, gates)

    def observe(self) -> Routed:
        output = torch.zeros_like(self._hidden)  # (tokens, width)
        norms = torch.zeros(self.index.shape, dtype=torch.float32, device=output.device)
        for expert, token, place in self._sent(self.index):
            found = self._run(self._hidden[token], expert)  # (some, width): f
            norms[token, place] = found.float().norm(dim=-1)
            output.index_add_(0, token, (found * self.gates[token, place, None]).to(output.dtype))
        return Routed(self.index, self.gates, norms, output, output)

    def sent(self, expert: int) -> Sent:
        place, token = torch.where((self.index == expert).T)
        return Sent(token, self.gates[token, place])

    def run(self, expert: int, tokens: Tensor) -> Tensor:
        return self._run(self._hidden[tokens], expert)

    def _sent(self, index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every expert that some token is sent to, which tokens these are, and in which place they have it."""
        for expert in index.unique().tolist():
            if expert < self._experts:
                place, token = torch.where((index == expert).T)  # in the order in which transformers' own loop has them
                yield expert, token, place

    def _run(self, x: Tensor, expert: int) -> Tensor:
        """f of one expert for tokens (some, width): its own forward with that expert alone, at a gate of 1."""
        one = torch.full((len(x), 1), expert, dtype=torch.int64, device=x.device)
        return self._own(x, one, torch.ones(len(x), 1, dtype=self.gates.dtype, device=x.device))


class _WeighedInputs(Call):
    """The tokens of every expert in turn, each times its gate, or zeros where it is not sent there."""

    def __init__(self, own: Callable[..., Tensor], experts: int, weighed: Tensor, hidden: Tensor) -> None:
        super().__init__(own, experts, hidden, *weights_of(weighed.reshape(experts, len(hidden), -1), hidden))
        self._weighed: Tensor | None = weighed  # let go of once it was multiplied with: as large as all experts' tokens

    def observe(self) -> Routed:
        assert self._weighed is not None
        returned, self._weighed = self._own(self._weighed), None  # (experts · tokens, width)
        every = returned.reshape(self._experts, -1, returned.shape[-1])
        there = self.index < self._experts
        parts = every[self.index.clamp_max(self._experts - 1), torch.arange(len(there), device=there.device)[:, None]]
        parts = parts * there[..., None]  # (tokens, k, width): what each expert adds
        norms = parts.float().norm(dim=-1) / self.gates.clamp_min(torch.finfo(torch.float32).tiny)
        return Routed(self.index, self.gates, norms.where(there, 0), parts.sum(1), returned)

    def sent(self, expert: int) -> Sent:
        _, token = torch.where((self.index == expert).T)
        return Sent(token, self.gates.new_ones(len(token), dtype=self._hidden.dtype))

    def run(self, expert: int, tokens: Tensor) -> Tensor:
        gates = (self.gates[tokens] * (self.index[tokens] == expert)).sum(1, keepdim=True).to(self._hidden.dtype)
        weighed = self._hidden.new_zeros(self._experts, len(tokens), self._hidden.shape[-1])
        weighed[expert] = gates * self._hidden[tokens]
        return self._own(weighed.flatten(0, 1)).reshape(weighed.shape)[expert]


def weights_of(weighed: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of experts (tokens, k) and gates, k the most that a token has, of tokens (experts, tokens, width) that are
    weighed versions of `hidden` (tokens, width): gates are ⟨weighed, x⟩ / ⟨x, x⟩."""
    experts = len(weighed)
    sent = weighed.any(-1).T  # (tokens, experts)
    k = max(1, int(sent.sum(1).max())) if len(sent) else 1
    index = torch.where(sent, torch.arange(experts, device=sent.device), experts).sort(1).values[:, :k]
    x = hidden.float()
    tokens = torch.arange(len(x), device=x.device)[:, None]
    rows = weighed[index.clamp_max(experts - 1), tokens].float()  # (tokens, k, width)
    gates = (rows * x[:, None]).sum(-1) / x.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return index, gates.where(index < experts, 0)
