"""While a block is worked on, a thread reads the next one from disk; never more than that one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.models.read_ahead import ReadAhead
from llmsparse.models.streamed import StreamedModel
from llmsparse.storage.checkpoint import CheckpointReader

BLOCKS = 3


@pytest.fixture
def folder(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model", layers=BLOCKS)


def test_the_next_block_is_read_while_one_is_worked_on_and_none_beyond(folder: Path) -> None:
    reader, begun = CheckpointReader(folder), [threading.Event() for _ in range(BLOCKS)]

    def read(index: int) -> dict[str, Tensor]:
        begun[index].set()
        return reader.read(key for key in reader.keys() if f".layers.{index}." in key)

    with ReadAhead(read, range(BLOCKS)) as ahead:
        for index in range(BLOCKS):
            taken = ahead.take(index)
            assert taken and all(f".layers.{index}." in key for key in taken)
            following = begun[index + 1 :]
            assert not following or following[0].wait(60), "nobody asked for it yet"
            assert not any(one.is_set() for one in following[1:])


def test_a_file_that_is_lost_ahead_is_told_when_its_block_is_wanted(folder: Path) -> None:
    reader = CheckpointReader(folder)
    model = StreamedModel(reader, device=torch.device("cpu"), dtype=torch.float32)
    cut = min(reader.spec(key).begin for key in model.block_keys(BLOCKS - 1))
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(cut)
    worked_on: list[str] = []
    with pytest.raises(CheckpointError, match="became shorter"):
        worked_on.extend(block.name for block in model.blocks())
    assert worked_on == model.block_names[: BLOCKS - 1]
