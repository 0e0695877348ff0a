"""Values from one process to another: anything that pickles, its tensors sent as they lie in memory and not copied into it.

All processes of a run are one program on one recipe, and trust each other as torch.distributed's own functions do.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmsparse.errors import MachineError

AT_ONCE = 1 << 30  # bytes of a tensor that go in one piece

Move = Callable[[Tensor], object]  # one flat uint8 tensor, on its way: sent from it, or received into it


def send(value: Any, to: int) -> None:
    with _peers():
        _write(value, partial(dist.send, dst=to))


def receive(source: int) -> Any:
    """What `send` sends; tensors of a GPU come to the one that is current here."""
    with _peers():
        return _read(partial(dist.recv, src=source))


def broadcast(value: Any, source: int) -> Any:
    """The value of process `source`, at every process; the others' is not looked at."""
    with _peers():
        if dist.get_rank() == source:
            _write(value, partial(dist.broadcast, src=source))
            return value
        return _read(partial(dist.broadcast, src=source))


def _write(value: Any, move: Move) -> None:
    stream, tensors = io.BytesIO(), list[Tensor]()
    _Pickler(stream, tensors).dump(value)
    specs = [(tensor.dtype, tensor.shape, tensor.is_cuda) for tensor in tensors]
    head = bytearray(pickle.dumps((specs, stream.getvalue())))
    move(torch.tensor([len(head)]).view(torch.uint8))
    move(torch.frombuffer(head, dtype=torch.uint8))
    for tensor in tensors:
        _in_pieces(tensor.contiguous(), move)


def _read(move: Move) -> Any:
    move((length := torch.empty(1, dtype=torch.int64)).view(torch.uint8))
    move(head := torch.empty(int(length), dtype=torch.uint8))
    specs, body = pickle.loads(head.numpy().tobytes())
    tensors: list[Tensor] = []
    for dtype, shape, on_gpu in specs:
        tensor = torch.empty(shape, dtype=dtype, device="cuda" if on_gpu else "cpu")
        _in_pieces(tensor, move)
        tensors.append(tensor)
    return _Unpickler(io.BytesIO(body), tensors).load()


def _in_pieces(tensor: Tensor, move: Move) -> None:
    if tensor.numel():
        for piece in tensor.reshape(-1).view(torch.uint8).split(AT_ONCE):
            move(piece)


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and puts their numbers in their place."""

    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self._tensors.append(obj.detach())
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


@contextmanager
def _peers() -> Generator[None]:
    """Within it a connection that breaks is a MachineError: the process at its other end is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise MachineError(
            "another process of this run has ended, so this one ends too; what is done is kept, go on with --resume"
        ) from error
