"""Finding the other processes of a run.

Where torchrun or accelerate launch started several, this one joins them through torch.distributed the first time that it is
asked for its group, over gloo and, for what lies on GPUs, NCCL. Where a script has joined them already, its group is used.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import atexit
import os
from datetime import timedelta
from functools import cache

from llmsparse.errors import MachineError, RecipeError
from llmsparse.ranks.group import ALONE, Ranks
from llmsparse.ranks.place import LAUNCH, Place, launched

JOIN_SECONDS = "LLMSPARSE_JOIN_SECONDS"  # of the environment: how long to wait for the others
DEFAULT_JOIN_SECONDS = 300
SOLVING = timedelta(days=2)  # that a process may work while others wait; one that dies is noticed at once


@cache
def joined() -> Ranks:
    """The group of this process. MachineError where the others do not come, RecipeError where there is no way to them."""
    place = launched()
    if place.size == 1:
        return ALONE
    import torch.distributed as dist

    if not dist.is_available():
        raise MachineError(
            f"this build of torch has no torch.distributed, so {place.size} processes cannot work together"
        )
    if not dist.is_initialized():
        _join(place)
    return Ranks(dist.get_rank(), dist.get_world_size(), place.local_size)


def _join(place: Place) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous  # pyright: ignore[reportUnknownVariableType]

    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    patience = timedelta(seconds=float(os.environ.get(JOIN_SECONDS, DEFAULT_JOIN_SECONDS)))
    others = [f"here/{rank}" for rank in range(place.size) if rank != place.rank]
    try:
        store, _, _ = next(iter(rendezvous("env://", place.rank, place.size, timeout=patience)))
        store = PrefixStore("llmsparse", store)
        store.set(f"here/{place.rank}", "yes")
        store.wait(others, patience)
    except ValueError as error:
        raise RecipeError(f"WORLD_SIZE is {place.size}, but {_first_line(error)}; {LAUNCH}") from error
    except RuntimeError as error:
        raise MachineError(
            f"waited {patience.seconds} s at {where} for {place.size - 1} other processes, and they did not all come; {LAUNCH}, "
            f"on every node, or give them longer with {JOIN_SECONDS}"
        ) from error
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=SOLVING)
    except RuntimeError as error:
        raise MachineError(f"cannot reach the other processes: {_first_line(error)}") from error
    atexit.register(_leave)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
