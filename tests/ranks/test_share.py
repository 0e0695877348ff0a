"""Which process holds which batches, and how many."""

from __future__ import annotations

import pytest
import torch

from llmsparse.ranks.group import Ranks
from llmsparse.ranks.share import Share
from llmsparse.shrinking.block_scores import SUFFIX_TOKENS, measured


@pytest.mark.parametrize("batches", [1, 5, 12, 13])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_process_knows_the_most_that_one_holds(batches: int, size: int) -> None:
    shares = [Share(Ranks(rank, size, size), ((2, 16),) * batches) for rank in range(size)]
    held = [2 * 16 * len(share.numbers) for share in shares]
    assert sum(held) == shares[0].tokens
    assert [share.most_tokens for share in shares] == [max(held)] * size


def test_the_first_process_need_not_hold_the_most() -> None:
    held = [len(Share(Ranks(rank, 8, 8), ((1, 1),) * 12).numbers) for rank in range(8)]
    assert held[0] < max(held)


def test_windows_that_blocks_are_scored_on_are_dealt_to_all_processes() -> None:
    batches = [torch.arange(4 * 2048).view(4, 2048)] * 3
    few = measured(batches)
    assert torch.equal(torch.cat(few), batches[0]) and few[0].numel() * 4 == SUFFIX_TOKENS
    shapes = tuple((len(ids), ids.shape[1]) for ids in few)
    assert all(len(Share(Ranks(rank, 4, 4), shapes).numbers) == 1 for rank in range(4))
    small = [torch.full((2, 16), number) for number in range(12)]
    assert all(torch.equal(one, other) for one, other in zip(measured(small), small, strict=True))
