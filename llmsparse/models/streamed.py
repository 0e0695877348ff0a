"""A language model as a stream of blocks, with never more than one of them in memory.

The transformers model describes itself: built on meta, it says what its blocks are, what each is called with, which
parameters are matrices that activations meet, and how they are named on disk. There is no code per architecture. The
model's own forward is used for everything, with blocks replaced by recorders (`embed`) or by the final hidden states
(`logits`). Of a model that wraps a language model, which reads images or sound besides, the blocks are those of the
language model, and what text does not run is never read.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse.encodings.reader import DecodedReader
from llmsparse.errors import CheckpointError
from llmsparse.models.activations import Activations, Recorder
from llmsparse.models.block import Block, Head
from llmsparse.models.complete import check_complete, check_depth, refuse_integers
from llmsparse.models.empty_model import assign, build_empty, drop, find_blocks, quiet, replaced, returning, stand_in
from llmsparse.models.meta_run import run_on_meta
from llmsparse.models.naming import Group, Naming, find_embedding, in_block
from llmsparse.models.origin import load_config
from llmsparse.models.prunable import refuse_shared_blocks
from llmsparse.models.read_ahead import ReadAhead
from llmsparse.models.weight import Slot, Weight, list_weights
from llmsparse.ranks.group import ALONE, Ranks
from llmsparse.ranks.share import Share
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.heap import release_freed
from llmsparse.storage.shard import is_finite

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
        encoded = isinstance(reader, DecodedReader)
        self.config: Any = config or load_config(
            reader.folder, trust_remote_code, packed=reader.packed, encoded=encoded
        )
        if reader.packed:
            vars(self.config).pop("quantization_config", None)
        check_depth(self.config, reader)
        refuse_integers(reader)
        self._reader = reader
        self._device = device
        self.dtype = dtype
        with quiet():
            self._model = build_empty(self.config, device, dtype, trust_remote_code)
        self._dtypes = {name: tensor.dtype for name, tensor in self._model.state_dict().items()}
        self._parameters = dict(self._model.named_parameters(remove_duplicate=False)).keys()
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
        self._loaded = False  # what lies outside the blocks and embeddings
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

    @property
    def device(self) -> torch.device:
        return self._device

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
        self._load(self._input)
        recorder = Recorder(len(self._blocks))

        def record(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                hidden = recorder.record(index, args, kwargs)
                if index == len(self._blocks) - 1:
                    raise _Recorded  # final norm and head have nothing to do yet
                return self._outline.wrap(hidden)

            return run

        with quiet(), replaced(self._blocks, record):
            for ids in share.take(batches):
                recorder.next_batch()
                with suppress(_Recorded):
                    self._model(ids.to(self._device), use_cache=False)
        self._drop(self._input)
        return Activations(recorder.hidden, recorder.calls, share)

    def blocks(self, names: Container[str] | None = None) -> Generator[Block]:
        """Every block, or those named, one after the other: loaded here, and evicted when the next one is asked for,
        which is read meanwhile by a thread."""
        wanted = [index for index, name in enumerate(self.block_names) if names is None or name in names]
        with ReadAhead(lambda index: self._read(self._block_keys[index]), wanted) as read:
            for index in wanted:
                block = self.block(index, read.take(index))
                try:
                    yield block
                finally:
                    block.evict()
                    release_freed()

    def block(self, index: int, stored: dict[str, Tensor] | None = None) -> Block:
        """Load a block, of the tensors given or from disk. Evict it before the next one is loaded."""
        self._drop(self._output)
        name = self.block_names[index]
        return Block(
            name,
            index,
            self._blocks[index],
            self.weights(index),
            self._read(self._block_keys[index]) if stored is None else stored,
            naming=self.naming,
            prefix=name + ".",
            device=self._device,
            fill=self._fill,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) of hidden states (batch, tokens, width) after the last block.

        Final norm, head, scaling and caps are the model's own code; each token stands for itself, so any part of a
        sequence will do. Hidden states that want a gradient get it; nothing else does.
        """
        self._load(self._output)
        return self._finish(hidden.to(self._device)).logits

    def head(self) -> Head | None:
        """The untied output head as a last pseudo-block, or None."""
        weights = self.head_weights()
        if not weights:
            return None
        self._load(self._output)
        stored, prefix = self._read([weights[0].key]), self._output.removesuffix("weight")
        known: dict[str, Any] = {"naming": self.naming, "prefix": prefix, "device": self._device, "fill": self._fill}
        head = Head(HEAD, len(self._blocks), self._head, weights, stored, **known)
        head.entering = self._entering_head
        return head

    @contextmanager
    def whole(self) -> Generator[Any]:
        """The model with all its weights, as transformers runs it; afterwards they are gone again."""
        self._load(self._input)
        self._load(self._output)
        for keys in self._block_keys:
            self._fill(self._read(keys))
        try:
            yield self._model
        finally:
            drop(self._model)
            self._loaded = False

    def _finish(self, hidden: Tensor) -> Any:
        """Run the model with every block giving back `hidden`, and nothing for an embedding."""
        width = self._model.get_parameter(self._input).shape[1]
        blank = torch.zeros(*hidden.shape[:2], width, dtype=hidden.dtype, device=self._device)
        final = self._outline.wrap(hidden)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self._device)
        with quiet(), replaced([self._embedding], returning(blank)), replaced(self._blocks, returning(final)):
            return self._model(ids, use_cache=False)

    def _entering_head(self, hidden: Tensor) -> Tensor:
        """What the head is called with for hidden states after the last block."""
        caught: list[Tensor] = []

        def catch(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(entering: Tensor) -> Any:
                caught.append(entering)
                raise _Recorded

            return run

        with replaced([self._head], catch), suppress(_Recorded):
            self._finish(hidden)
        return caught[0]

    def _load(self, part: str) -> None:
        """Load an embedding, and what else lies outside the blocks, unless they are there."""
        large = {self.tied.get(name, name) for name in (self._input, self._output)}
        rest = [
            key
            for key in self.outside_keys
            if (target := self.naming.target(key))
            and target not in large
            and not self._loaded
            and not self._idle(target)
        ]
        if rest:
            self._fill(self._read(rest))
        self._loaded = True
        if self._model.get_parameter(part).is_meta:
            self._fill(self._read(self.naming.groups[self.tied.get(part, part)].keys))

    def _idle(self, name: str) -> bool:
        """Whether a module tensor belongs to a part that text does not run."""
        return any(name.startswith(part + ".") for part in self._outline.idle)

    def _read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Tensors from disk. CheckpointError for a parameter that holds NaN or Inf."""
        for key, tensor in (tensors := self._reader.read(keys)).items():
            if self.naming.target(key) in self._parameters and not is_finite(tensor):
                what = f"{key.removesuffix('.weight')} in {self._reader.folder}"
                raise CheckpointError(f"{what} holds NaN or Inf; repair the checkpoint")
        return tensors

    def _drop(self, part: str) -> None:
        """Let go of an embedding, and of what is tied to it."""
        stored = self.tied.get(part, part)
        for name in (stored, *(name for name, origin in self.tied.items() if origin == stored)):
            assign(self._model, name, torch.empty_like(self._model.get_parameter(name), device="meta"))

    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put on-disk tensors into the model, cast to the dtype that each has there; always copies."""

        def prepare(target: str, tensor: Tensor) -> Tensor:
            return tensor.to(self._device, self._dtypes[target], copy=True)

        for name, tensor in self.naming.to_module(tensors, prepare):
            wanted = self._model.get_parameter_or_buffer(name).shape
            if tensor.shape != wanted:
                raise CheckpointError(
                    f"{self._reader.folder}: {name} has shape {list(tensor.shape)} on disk, config.json asks for "
                    f"{list(wanted)}; they do not belong together"
                )
            for same in (name, *(tied for tied, origin in self.tied.items() if origin == name)):
                assign(self._model, same, tensor)


class _Recorded(Exception):
    """Ends a forward whose rest is not wanted."""
