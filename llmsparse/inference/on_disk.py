"""A mixture whose experts stay on disk, but for as many as the memory that they are allowed can hold."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse.backends.choice import AUTO, UNPACKING, Choice, choose_backend
from llmsparse.backends.cpu import pages
from llmsparse.backends.protocol import WeightSpec
from llmsparse.errors import RecipeError
from llmsparse.formats import stored_bytes
from llmsparse.inference.expert_memory import ExpertMemory
from llmsparse.inference.expert_readers import ExpertReaders, Key, NativeReaders, ThreadReaders
from llmsparse.inference.foresight import Foresight
from llmsparse.inference.linear import PackedMatrix
from llmsparse.inference.stored_experts import STAYS, ReadyExpert, StoredExperts, StoredStack, read_index, specs_of
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.direct import DirectFile
from llmsparse.storage.disk import spell_least, spell_size

ATTRIBUTE = "on_disk"  # of a model whose experts stay there
READERS = 3  # they read and repack by turns; what is read ahead leaves one of them free
KERNELS = {"bitmask": "cpu-bitmask", "nested": "cpu-nested"}  # format → what runs it where nothing is measured
LEAST = READERS + 1  # experts in memory: those that are read, and one that is multiplied
PARTS = 16  # tensors of an expert, or less
MOST = 16  # times an expert's bytes on disk: no kernel's layout takes more
Leaves = Mapping[str, tuple[str, Mapping[str, Any], torch.dtype]]  # parameter → name in the folder, description, dtype


class OnDisk:
    """All experts of a model that stay on disk."""

    def __init__(
        self, layers: Sequence[StoredExperts], foresight: Foresight, memory: ExpertMemory, beside: int
    ) -> None:
        self.layers, self._foresight, self.memory = layers, foresight, memory
        self._bytes = beside

    def arriving(
        self, layer: int, wanted: Sequence[int], x: Tensor, k: int
    ) -> Iterator[tuple[int, Mapping[str, PackedMatrix]]]:
        """The experts that a layer wants for x (tokens, width), k for a token, each as it comes."""
        ahead = partial(self._foresight.after, layer, x, k) if self._foresight.known else None
        for expert, ready in self.memory.arriving(layer, wanted, ahead):
            yield expert, ready.matrices

    def __deepcopy__(self, memo: object) -> OnDisk:
        raise RecipeError(f"the mixture {STAYS}")

    def plan(self) -> str:
        """One line."""
        experts, stored = sum(one.count for one in self.layers), sum(one.stored_bytes() for one in self.layers)
        ahead = f"those of the next layers are read ahead by {self._foresight.known} of {len(self.layers)} routers"
        if not self._foresight.known:
            ahead = "none is read ahead, since no router can be asked by itself"
        return (
            f"{experts} experts of {len(self.layers)} layers stay on disk, {spell_size(stored)}; "
            f"{spell_size(self._bytes)} of memory hold {self.memory.room} of them; {ahead}"
        )

    def to_json(self) -> dict[str, Any]:
        experts = sum(one.count for one in self.layers)
        return {"experts": experts, "held": self.memory.room, **asdict(self.memory.tally)}


def told(tally: Mapping[str, Any]) -> str:
    """A few words on what `to_json` says."""
    asked = max(1, tally["asked"])
    return (
        f"of {tally['asked']} experts asked for {tally['found'] / asked:.0%} were in memory, {tally['foreseen'] / asked:.0%} were "
        f"foreseen; {spell_size(tally['read_bytes'])} read, {tally['waited_seconds']:.2f} s waited for"
    )


def keep_on_disk(
    model: nn.Module, reader: CheckpointReader, modules: Mapping[str, Leaves], *, size: int, backend: str
) -> OnDisk:
    """Experts of `modules` that are read when they are used, in `size` bytes of memory: their stacks take the place of packed
    ones. RecipeError where the bytes are too few, MachineError where a backend cannot run the experts or no thread starts."""
    files: dict[Path, DirectFile] = {}

    def close() -> None:
        for file in files.values():
            file.close()

    with contextlib.ExitStack() as undone:
        undone.callback(close)
        layers = [_stored(path, leaves, reader, backend, files) for path, leaves in modules.items()]
        *scratches, own = pages.Arena.row(READERS + 1, StoredExperts.scratch_bytes(layers))
        each = max(_prepared_bytes(one, own) for one in layers)
        beside = (
            (READERS + 1) * own.size
            + READERS * max(one.beside_bytes() for one in layers)
            + sum(one.index_bytes() for one in layers)
        )
        arenas = _arenas(layers, size, beside, each)
        foresight = Foresight.of(model, [(path, model.get_submodule(path)) for path in modules])
        memory = ExpertMemory(_readers(layers, scratches, own, close), arenas, lambda key: layers[key[0]].size(key[1]))
        weakref.finalize(model, memory.close)
        undone.pop_all()
    return OnDisk(layers, foresight, memory, len(arenas) * each + beside)


def _arenas(layers: Sequence[StoredExperts], size: int, beside: int, each: int) -> list[pages.Arena]:
    """As many of `each` bytes as `size` has room for beside what is read with, at most one for each expert. RecipeError."""
    experts, room = sum(one.count for one in layers), (size - beside) // each
    if room < LEAST:
        raise RecipeError(
            f"--expert-memory {spell_size(size)}: beside {spell_size(beside)} to read with it holds {max(0, room)} experts of "
            f"{spell_size(each)}, wanted {LEAST} or more; give it {spell_least(beside + LEAST * each)}"
        )
    arenas = pages.Arena.row(min(room, experts), each)
    held = torch.frombuffer(arenas[0].memory, dtype=torch.uint8)
    for layer in layers:
        for stack in layer.stacks.values():
            stack.prepared = held
    return arenas


def _readers(
    layers: Sequence[StoredExperts], scratches: Sequence[pages.Arena], own: pages.Arena, ended: Callable[[], None]
) -> ExpertReaders:
    if all(layer.by_number for layer in layers):
        return NativeReaders(layers, scratches, own, ended)

    def prepare(key: Key, arena: pages.Arena, scratch: pages.Arena) -> ReadyExpert:
        return layers[key[0]].prepare(key[1], arena, scratch)

    return ThreadReaders(prepare, scratches, own, ended)


def _stored(
    path: str, leaves: Leaves, reader: CheckpointReader, backend: str, files: dict[Path, DirectFile]
) -> StoredExperts:
    """`files`: those that are open, of all layers."""
    stacks: dict[str, StoredStack] = {}
    for leaf, (name, described, dtype) in leaves.items():
        specs = specs_of(name, described, reader.spec)
        choice, index = _choice(f"{path}.{leaf}", described, dtype, backend), read_index(name, described, specs)
        stacks[leaf] = StoredStack(f"{path}.{leaf}", dict(described), choice, dtype, specs, index)
    own = {spec.file for stack in stacks.values() for spec in stack.specs.values()}
    return StoredExperts(path, stacks, {file: files.setdefault(file, DirectFile(file)) for file in own})


def _prepared_bytes(layer: StoredExperts, scratch: pages.Arena) -> int:
    """Memory of the layer's largest expert."""
    (arena,) = pages.Arena.row(1, MOST * max(layer.stored_bytes() // layer.count, layer.size(layer.largest)))
    layer.prepare(layer.largest, arena, scratch)
    nested = any(stack.described.get("format") == "nested" for stack in layer.stacks.values())
    rounded = PARTS * pages.ALIGNED  # to whole lines of the cache, a little more for others
    return (
        arena.taken + rounded + (arena.taken // 16 if nested else 0)
    )  # what others take does not follow from their size


def _choice(name: str, described: Mapping[str, Any], dtype: torch.dtype, backend: str) -> Choice:
    """What runs each matrix of a stack. Only kernels that keep it packed are asked."""
    kind = str(described.get("format", "bitmask"))
    shape = tuple(int(number) for number in described["shape"])
    few = (described["group"], getattr(torch, described["dtype"])) if kind == "nested" else (None, None)
    where = (dtype, torch.device("cpu"), bool(described.get("transposed")), False, kind)
    spec = WeightSpec(shape, str(described.get("pattern", "unstructured")), int(described["nnz"]), *where, *few)
    choice = choose_backend(name, spec, stored_bytes(described), backend=backend)
    if backend == AUTO and choice.backend in UNPACKING:
        return choose_backend(name, spec, stored_bytes(described), backend=KERNELS[kind])
    if choice.backend in UNPACKING:
        raise RecipeError(
            f"--expert-memory with --backend {backend}, which unpacks experts: use auto or {KERNELS[kind]}"
        )
    return choice
