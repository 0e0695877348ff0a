"""A language model as a stream of blocks, with never more than one of them in memory.

The transformers model describes itself: built on meta, it says what its blocks are, what each is called with, which
parameters are matrices that activations meet, and how they are named on disk. There is no code per architecture. The
model's own forward is used for everything, with blocks replaced by recorders (`embed`) or by the final hidden states
(`logits`). Of a model that wraps a language model, which reads images or sound besides, the blocks are those of the
language model, and what text does not run is never read.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse.models.activations import Activations, Recorder
from llmsparse.models.block import Block, Head
from llmsparse.models.complete import check_complete, check_depth, config_of, refuse_integers
from llmsparse.models.empty_model import (
    Recorded,
    build_empty,
    caught,
    drop,
    find_blocks,
    quiet,
    replaced,
    returning,
    stand_in,
)
from llmsparse.models.filling import Filler
from llmsparse.models.meta_run import run_on_meta
from llmsparse.models.naming import Group, Naming, find_embedding, in_block
from llmsparse.models.prunable import refuse_shared_blocks
from llmsparse.models.read_ahead import ReadAhead
from llmsparse.models.weight import Slot, Weight, list_weights
from llmsparse.ranks.group import ALONE, Ranks
from llmsparse.ranks.share import Share
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.heap import release_freed

__all__ = ["Activations", "Block", "Head", "Slot", "StreamedModel", "Weight"]

HEAD = "head"


class StreamedModel:
    """The model in a checkpoint: what it is made of, and its parts one after the other.

    `dtype` is the one to compute in. Reads `config.json`, unless `config` is given, and headers, no tensor. Raises
    CheckpointError for a config that transformers has no model for, a model that is no stack of blocks, and tensors that
    are missing.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        *,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
        config: Any = None,
    ) -> None:
        self.config: Any = config or config_of(reader, trust_remote_code)
        check_depth(self.config, reader)
        refuse_integers(reader)
        self._reader = reader
        self.device = device
        self.dtype = dtype
        with quiet():
            self._model = build_empty(self.config, device, dtype, trust_remote_code)
        self.blocks_path, self._blocks = find_blocks(self._model)
        self.block_names = [f"{self.blocks_path}.{index}" for index in range(len(self._blocks))]

        keys = reader.keys()
        self.naming = Naming(self._model, keys)
        self.outside_keys: list[str] = []
        self._block_keys: list[list[str]] = [[] for _ in self._blocks]
        for key in keys:
            index = in_block(self.naming.target(key) or "", self.blocks_path)
            (self.outside_keys if index is None else self._block_keys[index]).append(key)
        self._input, self._embedding = find_embedding(self._model, self._model.get_input_embeddings(), reader.folder)
        self._output, self._head = find_embedding(self._model, self._model.get_output_embeddings(), reader.folder)
        self.tied = check_complete(self._model, self.naming, reader)  # what is not on disk → what it is tied to
        self._filler = Filler(self._model, reader, self.naming, self.tied, device)
        self._outline = run_on_meta(self._model, self._blocks, device)
        for part in self._outline.idle:
            stand_in(self._model, part, device)

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""
        return self._reader.folder

    @property
    def decoder_path(self) -> str:
        """Name of the language model inside the model, without its head."""
        decoder = self._model.get_decoder()
        return next(name for name, module in self._model.named_modules() if module is decoder)

    def bytes_of(self, key: str) -> int:
        """What an on-disk tensor takes once it is read."""
        spec = self._reader.spec(key)
        return spec.end - spec.begin

    def dtype_of(self, weight: Weight) -> torch.dtype:
        """The dtype that a weight is stored in."""
        return self._reader.spec(weight.key).dtype

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter and saved buffer of the module, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}

    @property
    def laid_out(self) -> dict[str, bool]:
        """Every parameter that activations are multiplied with → laid out (in, out); in the order of a block's calls."""
        return dict(self._outline.transposed)

    @property
    def parts(self) -> list[str]:
        """Parameters of two dimensions that are multiplied with part by part, as experts of a flat tensor are."""
        return sorted(name for name in self._outline.parts if in_block(name, self.blocks_path) is not None)

    def same_parameters(self) -> Iterator[tuple[str, str]]:
        """Pairs of names of one parameter: tied ones, and those of a module that stands in several places."""
        yield from self._model.all_tied_weights_keys.items()
        first: dict[int, str] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if first.setdefault(id(parameter), name) != name:
                yield name, first[id(parameter)]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.config.get_text_config().hidden_size

    @property
    def vocabulary(self) -> int:
        """How many logits there are for a token."""
        return self._model.get_parameter(self._output).shape[0]

    def block_keys(self, index: int) -> list[str]:
        """On-disk keys of a block, in file order."""
        return self._block_keys[index]

    def module(self, index: int, path: str) -> nn.Module:
        """A module inside a block, without its weights unless the block is loaded."""
        return self._blocks[index].get_submodule(path)

    def weights(self, index: int) -> list[Weight]:
        """Every matrix that a block multiplies activations with. Reads nothing."""
        prefix = self.block_names[index] + "."
        groups = [group for name, group in self.naming.groups.items() if name.startswith(prefix)]
        outline = self._outline
        return list_weights(self._reader, groups, self._blocks[index], prefix, outline.transposed, outline.kinds)

    @property
    def tied_head(self) -> str | None:
        """The name of the output head where it is tied to the input embedding."""
        return self._output.removesuffix(".weight") if self._output in self._model.all_tied_weights_keys else None

    def head_weights(self) -> list[Weight]:
        """The untied output head, which is not pruned by default; nothing where it is tied to the input embedding."""
        if self._output in self._model.all_tied_weights_keys:
            return []
        prefix, group = self._output.removesuffix("weight"), self.naming.groups[self._output]
        return list_weights(self._reader, [group], self._head, prefix, self._outline.transposed, {self._output: HEAD})

    def matrices(self) -> Iterator[tuple[Group, dict[str, bool]]]:
        """Tensors on disk that become linear weights, experts or the untied head, group by group, and which module
        tensors these are: name → laid out (in, out). Reads nothing. CheckpointError for blocks that share their weights."""
        refuse_shared_blocks(self)
        blocks = [weight for index in range(len(self._blocks)) for weight in self.weights(index) if weight.prunable]
        keys = {weight.key for weight in [*blocks, *self.head_weights()]}
        for group in self.naming.groups.values():
            if keys.intersection(group.keys):
                laid_out = self._outline.transposed
                yield group, {name: laid_out[name] for name in group.targets if name in laid_out}

    @torch.no_grad()
    def embed(self, batches: Sequence[Tensor], ranks: Ranks = ALONE) -> Activations:
        """What enters the first block for each batch of (batch, tokens) int64 ids, and what each block is called with; of
        several processes each embeds its share of the batches.

        Runs no block. The input embedding is read for it, and dropped afterwards.
        """
        share = Share(ranks, tuple((ids.shape[0], ids.shape[1]) for ids in batches))
        with ranks.together():
            self._filler.load(self._input, self._beside)
        recorder = Recorder(len(self._blocks))

        def record(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                hidden = recorder.record(index, args, kwargs)
                if index == len(self._blocks) - 1:
                    raise Recorded  # final norm and head have nothing to do yet
                return self._outline.wrap(hidden)

            return run

        with quiet(), replaced(self._blocks, record):
            for ids in share.take(batches):
                recorder.next_batch()
                with suppress(Recorded):
                    self._model(ids.to(self.device), use_cache=False)
        self._filler.drop(self._input)
        return Activations(recorder.hidden, recorder.calls, share)

    def blocks(self, names: Container[str] | None = None) -> Generator[Block]:
        """Every block, or those named, one after the other: loaded here, and evicted when the next one is asked for,
        which is read meanwhile by a thread."""
        wanted = [index for index, name in enumerate(self.block_names) if names is None or name in names]
        with ReadAhead(lambda index: self._filler.read(self._block_keys[index]), wanted) as read:
            for index in wanted:
                block = self.block(index, read.take(index))
                try:
                    yield block
                finally:
                    block.evict()
                    release_freed()

    def block(self, index: int, stored: dict[str, Tensor] | None = None) -> Block:
        """Load a block, of the tensors given or from disk. Evict it before the next one is loaded."""
        self._filler.drop(self._output)
        name = self.block_names[index]
        return Block(
            name,
            index,
            self._blocks[index],
            self.weights(index),
            self._filler.read(self._block_keys[index]) if stored is None else stored,
            naming=self.naming,
            prefix=name + ".",
            device=self.device,
            fill=self._filler.fill,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) of hidden states (batch, tokens, width) after the last block.

        Final norm, head, scaling and caps are the model's own code; each token stands for itself, so any part of a
        sequence will do. Hidden states that want a gradient get it; nothing else does.
        """
        self._filler.load(self._output, self._beside)
        return self._finish(hidden.to(self.device)).logits

    def head(self) -> Head | None:
        """The untied output head as a last pseudo-block, or None."""
        weights = self.head_weights()
        if not weights:
            return None
        self._filler.load(self._output, self._beside)
        stored, prefix = self._filler.read([weights[0].key]), self._output.removesuffix("weight")
        known: dict[str, Any] = {
            "naming": self.naming,
            "prefix": prefix,
            "device": self.device,
            "fill": self._filler.fill,
        }
        head = Head(HEAD, len(self._blocks), self._head, weights, stored, **known)
        head.entering = self._entering_head
        return head

    @contextmanager
    def whole(self) -> Generator[Any]:
        """The model with all its weights, as transformers runs it; afterwards they are gone again."""
        self._filler.load(self._input, self._beside)
        self._filler.load(self._output, self._beside)
        for keys in self._block_keys:
            self._filler.fill(self._filler.read(keys))
        try:
            yield self._model
        finally:
            drop(self._model)
            self._filler.forget()

    @property
    def _beside(self) -> list[str]:
        """Keys of what lies outside the blocks, embeddings aside, and is run on text."""
        large = {self.tied.get(name, name) for name in (self._input, self._output)}
        idle = tuple(f"{part}." for part in self._outline.idle)
        targets = {key: self.naming.target(key) for key in self.outside_keys}
        return [
            key for key, target in targets.items() if target and target not in large and not target.startswith(idle)
        ]

    def _finish(self, hidden: Tensor) -> Any:
        """Run the model with every block giving back `hidden`, and nothing for an embedding."""
        width = self._model.get_parameter(self._input).shape[1]
        blank = torch.zeros(*hidden.shape[:2], width, dtype=hidden.dtype, device=self.device)
        final = self._outline.wrap(hidden)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        with quiet(), replaced([self._embedding], returning(blank)), replaced(self._blocks, returning(final)):
            return self._model(ids, use_cache=False)

    def _entering_head(self, hidden: Tensor) -> Tensor:
        """What the head is called with for hidden states after the last block."""
        return caught(self._head, lambda: self._finish(hidden))
