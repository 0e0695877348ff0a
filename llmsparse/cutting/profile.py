"""How sparse the activations of a model are as it is: what `activations` could leave out, before anything is left out.

Of every block, the share of hidden units of its FFN that are next to nothing (arXiv 2210.06313 counts those that are 0, which are
many with ReLU and none with SiLU); of every matrix, what share of its input's scores (WINA) the larger half of a token's inputs
holds: 0.5 where all are alike, 1 where the other half could go for nothing.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsparse.encodings.reader import open_checkpoint
from llmsparse.errors import CalibrationError, NumericalError, RecipeError
from llmsparse.models.origin import fetch_model, is_packed, load_config, load_tokenizer, read_config
from llmsparse.models.streamed import Block, Slot, StreamedModel
from llmsparse.models.tap import Tap
from llmsparse.packing.packed_reader import PackedReader
from llmsparse.runs.device import choose_device, choose_dtype, split_batches, window_length
from llmsparse.runs.progress import Progress, Silent
from llmsparse.sparsity.activation import column_norms, scores
from llmsparse.text.kinds import is_token_file
from llmsparse.text.windows import load_windows

if TYPE_CHECKING:
    from rich.console import RenderableType

NEXT_TO_NOTHING = 0.01  # of the largest of a token


@dataclass(frozen=True)
class MatrixProfile:
    """Of a matrix, on the average token."""

    name: str
    shape: tuple[int, int]  # (out, in)
    near_zero: float  # share of its inputs that are next to nothing
    half_holds: float  # share of its scores that the larger half of its inputs holds


@dataclass(frozen=True)
class Profile:
    """The outcome of `profile`."""

    model: str
    tokens: int
    blocks: dict[str, list[MatrixProfile]]  # block → its matrices, in call order
    protocol: dict[str, Any]  # of the text
    seconds: float

    def lazy(self, block: str) -> MatrixProfile | None:
        """The matrix that the hidden units of the FFN enter: the widest of those that have more inputs than outputs."""
        wide = max(self.blocks[block], key=lambda one: one.shape[1], default=None)
        return wide if wide is not None and wide.shape[1] > wide.shape[0] else None

    def to_json(self) -> dict[str, Any]:
        lazy = {name: found.near_zero for name in self.blocks if (found := self.lazy(name)) is not None}
        return asdict(self) | {"lazy": lazy}

    def table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for title in ("block", "lazy units", "larger half holds, by matrix"):
            table.add_column(title)
        for name, matrices in self.blocks.items():
            lazy = self.lazy(name)
            held = ", ".join(f"{one.name.rpartition('.')[2]} {one.half_holds:.0%}" for one in matrices)
            table.add_row(Text(name), "" if lazy is None else f"{lazy.near_zero:.1%}", Text(held))
        table.caption = (
            f"lazy: below {NEXT_TO_NOTHING:.0%} of the token's largest; scores |x|·‖W_:,i‖; {self.tokens:,} tokens"
        )
        table.caption_justify = "left"
        return table


def profile(
    model: str | Path,
    calibration: str | Path = "builtin",
    *,
    samples: int = 16,
    seq_len: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    text_field: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """Profile `model` (folder, packed or not, hub id, or `builtin`) on windows of a text, block by block. Raises a LlmsparseError of one
    line."""
    started, progress = time.perf_counter(), progress or Silent()
    for name, value, least in (("samples", samples, 1), ("seq_len", seq_len, 2), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise RecipeError(f"{name}: got {value}, wanted at least {least}")
    text = str(calibration)
    folder = fetch_model(str(model), revision)
    packed = is_packed(read_config(folder))
    config = load_config(folder, trust_remote_code, packed=packed, encoded=True)
    reader = PackedReader(folder) if packed else open_checkpoint(folder)
    place = choose_device(device)
    streamed = StreamedModel(
        reader, device=place, dtype=choose_dtype(dtype, place, reader), trust_remote_code=trust_remote_code
    )
    windows = load_windows(
        text,
        None if is_token_file(text) else load_tokenizer(folder, trust_remote_code),
        seq_len=window_length(config, seq_len, text),
        samples=samples,
        seed=seed,
        held_out=0,
        text_field=text_field,
        vocabulary=streamed.vocabulary,
    )
    if not windows.ids.numel():
        raise CalibrationError(f"{text}: no window of text")
    blocks: dict[str, list[MatrixProfile]] = {}
    with torch.no_grad(), progress:
        acts = streamed.embed(split_batches(windows.ids, batch_size, place, streamed.hidden_size))
        progress.start(len(streamed.block_names))
        for block in streamed.blocks():
            progress.block(block.name)
            sums = _Sums(block)
            block.run(acts, Tap(block, sums.note), into=acts)
            blocks[block.name] = sums.found()
    return Profile(str(model), windows.ids.numel(), blocks, windows.protocol, time.perf_counter() - started)


class _Sums:
    """What is added up over the tokens of a block."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._slots: dict[Slot, Tensor] = {}  # → norms of the columns
        for weight in block.weights:
            if weight.kind == "linear" and weight.prunable and weight.slot not in self._slots:
                parameter = block.module.get_parameter(weight.slot[0])
                same = tuple(parameter.shape) == weight.shape or parameter.shape[-1] == weight.shape[1]
                self._slots[weight.slot] = column_norms(parameter if same else parameter.T)
        self._near: dict[Slot, float] = {}
        self._held: dict[Slot, float] = {}
        self._tokens: dict[Slot, int] = {}

    def note(self, slot: Slot, x: Tensor) -> None:
        """x (tokens, in)."""
        norms = self._slots.get(slot)
        if norms is None or not x.numel():
            return
        size = x.float().abs()
        if not bool(size.isfinite().all()):
            raise NumericalError(f"the activations that enter {slot[0]} are NaN or Inf; try --dtype float32")
        near = size <= NEXT_TO_NOTHING * size.amax(-1, keepdim=True)
        found = scores(x, norms)
        half = found.topk(-(-x.shape[1] // 2), dim=-1).values.sum(-1) / found.sum(-1).clamp_min(1e-30)
        self._near[slot] = self._near.get(slot, 0.0) + near.float().mean(-1).sum().item()
        self._held[slot] = self._held.get(slot, 0.0) + half.sum().item()
        self._tokens[slot] = self._tokens.get(slot, 0) + x.shape[0]

    def found(self) -> list[MatrixProfile]:
        shapes = {weight.slot: weight for weight in reversed(self._block.weights)}
        return [
            MatrixProfile(shapes[slot].name, shapes[slot].shape, self._near[slot] / count, self._held[slot] / count)
            for slot, count in self._tokens.items()
        ]
