"""Where a run computes, in which dtype, and in batches of which size."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import MachineError, RecipeError, did_you_mean
from llmsparse.ranks.place import launched
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.text.shares import Sources, holds_tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
LEAST_TOKENS = 512  # enough for products at full speed on a CPU ...
BATCH_NUMBERS_ON_CPU = 1 << 20  # ... so wide models get small batches: a block's first one is run once more
ROUTED_TOKENS = 2048  # on a CPU where experts share a batch out: enough for the products of each
DEFAULT_WINDOW = 2048


@contextmanager
def full_float32() -> Generator[None]:
    """Within it float32 products on a GPU keep the full mantissa, which equations need; the caller's choice comes back."""
    products = torch.backends.cuda.matmul
    before: Any = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU. MachineError for a device this machine lacks.

    Of several processes on a machine each takes a GPU of its own, from the named one on, and what others send to it comes
    there.
    """
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"--device {name!r} is no device; use auto, cpu or cuda:0") from None
    if device.type == "cuda" and launched().local_size > 1:
        device = torch.device("cuda", (device.index or 0) + launched().local_rank)
        if device.index >= (count := torch.cuda.device_count()):
            raise MachineError(
                f"no GPU for local rank {launched().local_rank}: this machine has {count}; start fewer processes"
            )
        torch.cuda.set_device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    if device.type not in BATCH_TOKENS:
        raise RecipeError(f"--device {name}: only cpu and cuda devices are supported")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def choose_dtype(name: str, device: torch.device, reader: CheckpointReader) -> torch.dtype:
    """The dtype a model computes in; what is stored keeps its own.

    `auto` is the checkpoint's most frequent floating dtype on a GPU, and float32 on a CPU, where few have fast
    half-precision products.
    """
    if name != "auto":
        if name not in DTYPES:
            raise RecipeError(f"--dtype {name!r} is no dtype{did_you_mean(name, ['auto', *DTYPES])}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    sizes: dict[torch.dtype, int] = {}
    for key in reader.keys():
        spec = reader.spec(key)
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.end - spec.begin
    stored = max(sizes, key=lambda dtype: sizes[dtype])
    return stored if stored in DTYPES.values() else torch.float32


def window_length(config: Any, asked: int | None, text: Sources) -> int | None:
    """Tokens in a window: as asked, or min(2048, the model's maximum); None lets a token file say it.

    RecipeError when asked for more than the model's maximum.
    """
    text_config = config.get_text_config()
    longest: int | None = getattr(text_config, "max_position_embeddings", None)
    if asked is not None and longest is not None and asked > longest:
        raise RecipeError(
            f"--seq-len {asked} is above the model's maximum of {longest}; use --seq-len {longest} or less"
        )
    if asked is not None or holds_tokens(text):
        return asked
    return min(DEFAULT_WINDOW, longest or DEFAULT_WINDOW)


def split_batches(
    ids: Tensor, batch_size: int | None, device: torch.device, width: int, *, least: int = 1, routed: bool = False
) -> list[Tensor]:
    """(windows, tokens) → batches of at most `batch_size` windows, by default a few thousand tokens of `width` each, more
    where the work is on experts, which share them out (`routed`).

    Batches are smaller where there would be fewer than `least` of them, down to one window each.
    """
    tokens = BATCH_TOKENS[device.type]
    if device.type == "cpu":
        tokens = ROUTED_TOKENS if routed else min(tokens, max(LEAST_TOKENS, BATCH_NUMBERS_ON_CPU // width))
    size = batch_size or max(1, tokens // ids.shape[1])
    if 0 < -(-len(ids) // size) < least:
        size = max(1, (len(ids) - 1) // (least - 1))
    return [ids[start : start + size] for start in range(0, len(ids), size)]
