"""The experts of one module where they lie, in the files of a packed folder: each is read and made ready by itself."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.backends.choice import Choice
from llmsparse.backends.cpu import pages
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.formats import PackedTensor, layout, restore, stored_bytes
from llmsparse.formats.one_matrix import check_index, index_of, matrix, spans
from llmsparse.inference.linear import PackedMatrix
from llmsparse.storage.direct import DirectFile, room_for
from llmsparse.storage.shard import TensorSpec, bytes_of, read_into

KEPT = ("_steps",)  # parts that a backend keeps as they are, and does not copy from
STAYS = "stays on disk: load the model without expert_memory to move or to edit it"


class PassingMatrix(PackedMatrix):
    """One whose memory is another's soon: there is no way back through it."""

    def dense(self) -> Tensor:
        raise RecipeError(
            "experts that stay on disk have no gradients: load the model without expert_memory to train it"
        )


@dataclass(eq=False)
class StoredStack:
    """A weight of all experts of a module, on disk. It stands where a PackedStack would."""

    name: str
    described: dict[str, Any]
    choice: Choice
    dtype: torch.dtype  # to unpack to
    specs: Mapping[str, TensorSpec]  # suffix → where it lies
    index: Tensor | None
    prepared: Tensor | None = None  # the memory in which its experts lie with others

    together = False
    copy = None
    device = torch.device("cpu")

    @property
    def transposed(self) -> bool:
        return bool(self.described.get("transposed"))

    def packed(self) -> PackedTensor:
        """The whole, read for the moment."""
        parts = {suffix: read_whole(spec) for suffix, spec in self.specs.items()}
        return restore(self.name, self.described, parts, self.dtype)

    def unpacked(self) -> Iterator[Tensor]:
        """Its matrices (out, in), each read for the moment."""
        for number in range(int(self.described["shape"][0])):
            parts: dict[str, Tensor] = {}
            for suffix, (begin, end) in _spans(self, number).items():
                parts[suffix] = torch.empty(end - begin, dtype=torch.uint8)
                read_into(self.specs[suffix], begin, bytes_of(parts[suffix]))
            found = matrix(self.described, self.index, number, parts, self.dtype)
            try:
                yield PackedMatrix(found, self.choice).dense()
            except CheckpointError as error:
                raise CheckpointError(f"{self.name}, expert {number}: {error}") from error

    def dense(self) -> Tensor:
        weight = self.packed().unpack()
        return weight.transpose(-1, -2) if self.transposed else weight

    def carried(self, fn: Callable[[Tensor], Tensor]) -> StoredStack:
        """After `model.to(...)`, which may change nothing. RecipeError."""
        target = fn(torch.empty(0, dtype=self.dtype))
        if (target.device, target.dtype) != (self.device, self.dtype):
            raise RecipeError(f"{self.name} {STAYS}")
        return self

    def reloaded(self, name: str, state_dict: dict[str, Any], missing: list[str]) -> StoredStack:
        """After `load_state_dict`, which may not touch it. RecipeError."""
        if any(name + suffix in state_dict for suffix in ("", *self.specs)):
            raise RecipeError(f"{name} {STAYS}")
        missing.append(name)
        return self


class StoredExperts:
    """The experts of one module."""

    def __init__(self, name: str, stacks: Mapping[str, StoredStack], files: Mapping[Path, DirectFile]) -> None:
        self.name, self.stacks, self._files = name, dict(stacks), files
        self.count = int(next(iter(stacks.values())).described["shape"][0])

    def size(self, expert: int) -> int:
        """Bytes of an expert on disk."""
        return sum(end - begin for stack in self.stacks.values() for begin, end in _spans(stack, expert).values())

    @property
    def largest(self) -> int:
        """The expert with the most bytes on disk."""
        return max(range(self.count), key=self.size)

    def scratch_bytes(self) -> int:
        """Of memory that `prepare` reads into."""
        return max(
            sum(room_for(end - begin) for begin, end in _spans(stack, expert).values())
            for stack in self.stacks.values()
            for expert in range(self.count)
        )

    def stored_bytes(self) -> int:
        return sum(stored_bytes(stack.described) for stack in self.stacks.values())

    def index_bytes(self) -> int:
        return sum(stack.index.nbytes for stack in self.stacks.values() if stack.index is not None)

    def prepare(self, expert: int, arena: pages.Arena, scratch: mmap.mmap) -> dict[str, PackedMatrix]:
        """An expert's matrices by the name of their stack, in `arena`. CheckpointError where they are damaged."""
        made: dict[str, PackedMatrix] = {}
        with torch.no_grad(), pages.within(arena):
            for leaf, stack in self.stacks.items():
                try:
                    made[leaf] = PassingMatrix(self._read(stack, expert, scratch), stack.choice, stack.transposed)
                except CheckpointError as error:
                    raise CheckpointError(f"{stack.name}, expert {expert}: {error}") from error
        return made

    def _read(self, stack: StoredStack, expert: int, scratch: mmap.mmap) -> PackedTensor:
        parts: dict[str, Tensor] = {}
        at = 0
        for suffix, (begin, end) in _spans(stack, expert).items():
            spec = stack.specs[suffix]
            found = (
                self._files[spec.file].read(spec.begin + begin, spec.begin + end, scratch, at) if end > begin else at
            )
            part = (
                torch.frombuffer(scratch, dtype=torch.uint8, count=end - begin, offset=found) if end > begin else _NONE
            )
            misplaced = found % spec.dtype.itemsize  # as in a file whose header is of an odd length
            parts[suffix] = pages.copy(part) if suffix in KEPT else part.clone() if misplaced else part
            at += room_for(end - begin)
        return matrix(stack.described, stack.index, expert, parts, stack.dtype)


_NONE = torch.empty(0, dtype=torch.uint8)


def read_index(name: str, described: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Tensor | None:
    """What says where each expert begins, if anything must. CheckpointError where it is damaged."""
    suffix = index_of(described)
    if suffix is None:
        return None
    index = read_whole(specs[suffix])
    check_index(name, described, index)
    return index


def read_whole(spec: TensorSpec) -> Tensor:
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    if tensor.numel():
        flat: Any = tensor.view(-1).view(torch.uint8).numpy()
        read_into(spec, 0, memoryview(flat))
    return tensor


def specs_of(name: str, described: Mapping[str, Any], spec: Callable[[str], TensorSpec]) -> dict[str, TensorSpec]:
    """Suffix → where a tensor of a weight lies."""
    return {suffix: spec(name + suffix) for suffix in layout(described)}


def _spans(stack: StoredStack, expert: int) -> dict[str, tuple[int, int]]:
    return spans(stack.described, stack.index, expert)
