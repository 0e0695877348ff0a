"""What flows through a model while it is made over, and what nobody reads is not computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmsparse.models.streamed import StreamedModel
from llmsparse.runs.streams import Streams
from llmsparse.storage.checkpoint import CheckpointReader


@pytest.mark.parametrize("to_head", [False, True])
def test_calibration_windows_go_through_the_last_block_only_where_the_head_wants_them(
    tiny_llama: Callable[..., Path], tmp_path: Path, to_head: bool
) -> None:
    reader = CheckpointReader(tiny_llama(tmp_path / "model", layers=3))
    model = StreamedModel(reader, device=torch.device("cpu"), dtype=torch.float32)
    ids = torch.randint(0, 384, (4, 16), generator=torch.Generator().manual_seed(0))
    streams = Streams(model, [ids[:2]], [ids[2:]], to_head=to_head)
    whole, entering = model.embed([ids[:2]]), list[torch.Tensor]()
    for block in model.blocks():
        streams.through_source(block)
        assert torch.equal(streams.calibration.hidden[0], whole.hidden[0]), "behind the blocks before"
        entering.append(whole.hidden[0])
        streams.through_made(block)
        block.run(whole, into=whole)
    assert torch.equal(streams.calibration.hidden[0], whole.hidden[0] if to_head else entering[-1])
    found = streams.perplexity()
    assert found is not None and found["before"] == pytest.approx(found["after"]), "nothing was made over"
