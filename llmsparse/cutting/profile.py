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
from llmsparse.models.experts import matrix_of_expert, runs_by_expert
from llmsparse.models.origin import fetch_model, is_packed, load_config, load_tokenizer, read_config
from llmsparse.models.streamed import Block, Slot, StreamedModel, Weight
from llmsparse.models.tap import Tap
from llmsparse.models.thresholds import refuse_cut
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
    """Of a matrix, on the average token; of the experts of a mixture, on the average token that was routed to one of them."""

    name: str
    shape: tuple[int, int]  # (out, in), of each expert
    near_zero: float  # share of its inputs that are next to nothing
    half_holds: float  # share of its scores that the larger half of its inputs holds
    experts: int = 0  # that hold such a matrix each


@dataclass(frozen=True)
class Profile:
    """The outcome of `profile`."""

    model: str
    tokens: int
    blocks: dict[str, list[MatrixProfile]]  # block → its matrices, in call order
    protocol: dict[str, Any]  # of the text
    seconds: float

    def lazy(self, block: str) -> MatrixProfile | None:
        """The matrix that the hidden units of the FFN enter: of experts their last one, else the widest of those that have more
        inputs than outputs."""
        routed = [one for one in self.blocks[block] if one.experts]
        if routed:
            return routed[-1]
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
    refuse_cut(str(model), read_config(folder))
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
        self._norms: dict[Slot, Tensor] = {}  # of the columns
        for weight in block.weights:
            if weight.prunable and weight.slot not in self._norms and weight.kind in ("linear", "expert"):
                self._norms[weight.slot] = column_norms(_matrix(block, weight))
        self._near: dict[str, float] = {}  # by parameter
        self._held: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    def note(self, slot: Slot, x: Tensor) -> None:
        """x (tokens, in)."""
        norms, name = self._norms.get(slot), slot[0]
        if norms is None or not x.numel():
            return
        size = x.float().abs()
        if not bool(size.isfinite().all()):
            raise NumericalError(f"the activations that enter {name} are NaN or Inf; try --dtype float32")
        near = size <= NEXT_TO_NOTHING * size.amax(-1, keepdim=True)
        found = scores(x, norms)
        half = found.topk(-(-x.shape[1] // 2), dim=-1).values.sum(-1) / found.sum(-1).clamp_min(1e-30)
        self._near[name] = self._near.get(name, 0.0) + near.float().mean(-1).sum().item()
        self._held[name] = self._held.get(name, 0.0) + half.sum().item()
        self._tokens[name] = self._tokens.get(name, 0) + x.shape[0]

    def found(self) -> list[MatrixProfile]:
        """Experts that lie in one parameter are one matrix."""
        weights = {weight.slot[0]: weight for weight in reversed(self._block.weights)}
        made: list[MatrixProfile] = []
        for name, count in self._tokens.items():
            held = self._block.module.get_parameter(name)
            experts = len(held) if held.dim() == 3 else 0
            matrix = _matrix(self._block, weights[name])
            shape = (matrix.shape[0], matrix.shape[1]) if experts else weights[name].shape
            called = f"{self._block.name}.{name}" if experts else weights[name].name
            made.append(MatrixProfile(called, shape, self._near[name] / count, self._held[name] / count, experts))
        return made


def _matrix(block: Block, weight: Weight) -> Tensor:
    """(out, in) as the module holds it."""
    name, expert = weight.slot
    path, _, leaf = name.rpartition(".")
    module, parameter = block.module.get_submodule(path), block.module.get_parameter(name)
    if expert is not None and runs_by_expert(module):
        return matrix_of_expert(module, leaf, expert)
    matrix = parameter if expert is None else parameter[expert]
    return matrix if matrix.shape[-1] == weight.shape[1] else matrix.T
