"""The experts of one module where they lie, in the files of a packed folder: each is read and made ready by itself."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.backends import BACKENDS
from llmsparse.backends.choice import Choice
from llmsparse.backends.cpu import nested, pages
from llmsparse.backends.cpu.stored import LoadedMatrix, Loading, Span, StoredMatrix, load, rows_bytes
from llmsparse.backends.cpu_bitmask import CpuBitmask
from llmsparse.backends.protocol import RunsMany
from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.formats import PackedTensor, format_of, layout, restore, stored_bytes
from llmsparse.formats.nested import Nested
from llmsparse.formats.one_matrix import Spans, check_index, index_of, matrix, spans
from llmsparse.inference import graphed
from llmsparse.inference.linear import PackedMatrix
from llmsparse.storage.direct import DirectFile, room_for
from llmsparse.storage.shard import TensorSpec, bytes_of, read_into

KEPT = ("_steps",)  # parts that a backend keeps as they are, and does not copy from
STAYS = "stays on disk: load the model without expert_memory to move or to edit it"


class PassingMatrix(PackedMatrix):
    """One whose memory is another's soon: there is no way back through it."""

    @classmethod
    def holding(cls, loaded: LoadedMatrix, stack: StoredStack) -> PassingMatrix:
        """What has been read for a stack's backend already."""
        made = cls.__new__(cls)
        vars(made).update(stack.alike, prepared=loaded.weight())
        made.described = {**stack.described, "shape": list(stack.shape), "nnz": loaded.of.nnz}
        made.handle = graphed.name(made)
        return made

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
    _spans: dict[int, Spans] = field(default_factory=dict[int, Spans])
    _address: int | None = None  # of the index

    together = False
    copy = None
    device = torch.device("cpu")

    @property
    def transposed(self) -> bool:
        return bool(self.described.get("transposed"))

    def spans(self, expert: int) -> Spans:
        """Where an expert lies in the tensors, but for the index."""
        if expert not in self._spans:
            self._spans[expert] = spans(self.described, self.index, expert)
        return self._spans[expert]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Of a matrix."""
        return int(self.described["shape"][-2]), int(self.described["shape"][-1])

    @property
    def pattern(self) -> str:
        return str(self.described["pattern"])

    @cached_property
    def alike(self) -> dict[str, Any]:
        """What is the same in the matrices of all experts."""
        backend = BACKENDS[self.choice.backend]
        return {
            "choice": self.choice, "backend": backend, "transposed": self.transposed, "device": self.device, "dtype": self.dtype,
            "copy": None, "out_features": self.shape[0], "runs_many": isinstance(backend, RunsMany),
        }  # fmt: skip

    def index_of(self, expert: int) -> tuple[int, int]:
        """The address of where an expert's rows begin in the index, and the bytes of a number; 0 and 0 without one."""
        if self.index is None:
            return 0, 0
        if self._address is None:
            self._address = self.index.data_ptr()
        each = self.index.element_size()
        return self._address + expert * self.shape[0] * each, each

    @cached_property
    def as_stored(self) -> bool:
        """Whether it is multiplied by the kernels for bitmasks in the dtype that it is stored in."""
        stored: torch.dtype = getattr(torch, self.described["dtype"])
        return self.choice.backend == CpuBitmask.name and stored == self.dtype

    def packed(self) -> PackedTensor:
        """The whole, read for the moment."""
        parts = {suffix: read_whole(spec) for suffix, spec in self.specs.items()}
        return restore(self.name, self.described, parts, self.dtype)

    def unpacked(self) -> Iterator[Tensor]:
        """Its matrices (out, in), each read for the moment."""
        for number in range(int(self.described["shape"][0])):
            parts: dict[str, Tensor] = {}
            for suffix, (begin, end) in self.spans(number).items():
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


class ReadyExpert:
    """An expert in memory, whose matrices are made when they are wanted: by the name of their stack."""

    def __init__(
        self, stacks: Mapping[str, StoredStack], held: Mapping[str, PackedMatrix] | Sequence[LoadedMatrix]
    ) -> None:
        self._stacks, self._held = stacks, held

    @cached_property
    def matrices(self) -> Mapping[str, PackedMatrix]:
        if isinstance(self._held, Mapping):
            return self._held
        pairs = zip(self._stacks.items(), self._held, strict=True)
        return {leaf: PassingMatrix.holding(one, stack) for (leaf, stack), one in pairs}


class StoredExperts:
    """The experts of one module."""

    def __init__(self, name: str, stacks: Mapping[str, StoredStack], files: Mapping[Path, DirectFile]) -> None:
        self.name, self.stacks, self._files = name, dict(stacks), files
        self.count = int(next(iter(stacks.values())).described["shape"][0])

    def size(self, expert: int) -> int:
        """Bytes of an expert on disk."""
        return sum(end - begin for stack in self.stacks.values() for begin, end in stack.spans(expert).values())

    @property
    def largest(self) -> int:
        """The expert with the most bytes on disk."""
        return max(range(self.count), key=self.size)

    @staticmethod
    def scratch_bytes(layers: Sequence[StoredExperts]) -> int:
        """Of memory that any of `layers` can be read into. C keeps a place for the rows of all of them behind what is read."""
        stacks = [stack for layer in layers for stack in layer.stacks.values()]
        read = (
            sum(room_for(end - begin) for begin, end in stack.spans(expert).values())
            for stack in stacks
            for expert in range(int(stack.described["shape"][0]))
        )
        return max(read) + rows_bytes(max(stack.shape[0] for stack in stacks))

    def beside_bytes(self) -> int:
        """Of memory that `prepare` takes for a while, beside the scratch."""
        few = [stack for stack in self.stacks.values() if format_of(stack.described) is Nested]
        return max((nested.beside(*stack.shape) for stack in few), default=0)

    def stored_bytes(self) -> int:
        return sum(stored_bytes(stack.described) for stack in self.stacks.values())

    def index_bytes(self) -> int:
        return sum(stack.index.nbytes for stack in self.stacks.values() if stack.index is not None)

    def prepare(self, expert: int, arena: pages.Arena, scratch: pages.Arena) -> ReadyExpert:
        """An expert, in `arena`. CheckpointError where it is damaged."""
        with contextlib.ExitStack() as files:
            for file in self._files.values():
                files.enter_context(file.used())
            if self.by_number and load(loading := Loading(self.lying(expert), arena), scratch):
                return self.ready(loading)
            return ReadyExpert(self.stacks, self._prepare(expert, arena, scratch))

    def _prepare(self, expert: int, arena: pages.Arena, scratch: pages.Arena) -> dict[str, PackedMatrix]:
        """More slowly than C does; whatever is wrong is said."""
        made: dict[str, PackedMatrix] = {}
        with torch.no_grad(), pages.within(arena):
            for leaf, stack in self.stacks.items():
                try:
                    made[leaf] = PassingMatrix(self._read(stack, expert, scratch), stack.choice, stack.transposed)
                except CheckpointError as error:
                    raise CheckpointError(f"{stack.name}, expert {expert}: {error}") from error
        return made

    def ready(self, loading: Loading) -> ReadyExpert:
        """What has been loaded."""
        return ReadyExpert(self.stacks, loading.loaded)

    def lying(self, expert: int) -> list[StoredMatrix]:
        """Where an expert's matrices lie, for C to read them. CheckpointError where a file cannot be opened."""
        found = {file: one.descriptor() for file, one in self._files.items()}
        lying: list[StoredMatrix] = []
        for stack in self.stacks.values():
            values, mask = (
                Span(
                    stack.specs[suffix].begin + begin, stack.specs[suffix].begin + end, *found[stack.specs[suffix].file]
                )
                for suffix, (begin, end) in stack.spans(expert).items()
            )
            offsets, each = stack.index_of(expert)
            lying.append(StoredMatrix(stack.shape, stack.pattern, stack.dtype, values, mask, offsets, each))
        return lying

    @cached_property
    def by_number(self) -> bool:
        """Whether C can read them."""
        stacks, files = self.stacks.values(), self._files.values()
        return all(stack.as_stored for stack in stacks) and all(file.by_number for file in files)

    def _read(self, stack: StoredStack, expert: int, scratch: pages.Arena) -> PackedTensor:
        parts: dict[str, Tensor] = {}
        at = scratch.begin
        for suffix, (begin, end) in stack.spans(expert).items():
            spec = stack.specs[suffix]
            found = (
                self._files[spec.file].read(spec.begin + begin, spec.begin + end, scratch.memory, at)
                if end > begin
                else at
            )
            part = (
                torch.frombuffer(scratch.memory, dtype=torch.uint8, count=end - begin, offset=found)
                if end > begin
                else _NONE
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
