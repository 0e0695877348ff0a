"""Calls are recorded as they are, and equal tensors in them are one."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.models.activations import Activations, Recorder


class Tables(NamedTuple):
    cosine: Tensor
    sine: Tensor


def recorded(*calls: dict[str, Any]) -> Activations:
    recorder = Recorder(1)
    for kwargs in calls:
        recorder.next_batch()
        recorder.record(0, (torch.ones(1, 2, 3),), kwargs)
    return Activations(recorder.hidden, recorder.calls)


def test_equal_tensors_become_one_wherever_they_stand() -> None:
    acts = recorded(
        {"mask": torch.ones(4)}, {"mask": torch.ones(4)}, {"nested": [(torch.ones(4),), {"a": torch.ones(4)}]}
    )
    first, second, third = (call.kwargs for call in acts.calls[0])
    assert first["mask"] is second["mask"] is third["nested"][0][0] is third["nested"][1]["a"]
    assert acts.nbytes == 3 * 6 * 4 + 4 * 4


@pytest.mark.parametrize("other", [torch.zeros(4), torch.ones(4, dtype=torch.float64), torch.ones(2, 2), torch.ones(5)])
def test_tensors_that_differ_in_value_dtype_or_shape_stay_apart(other: Tensor) -> None:
    first, second = (call.kwargs["mask"] for call in recorded({"mask": torch.ones(4)}, {"mask": other}).calls[0])
    assert second is other and first is not other


def test_a_duplicate_is_let_go_after_its_batch() -> None:
    recorder, duplicate = Recorder(1), torch.ones(4)
    for mask in (torch.ones(4), duplicate):
        recorder.next_batch()
        recorder.record(0, (torch.ones(1, 2, 3),), {"mask": mask})
    gone = weakref.ref(duplicate)
    del duplicate, mask
    recorder.next_batch()
    assert gone() is None


def test_containers_keep_their_kind_and_shared_state_its_identity() -> None:
    state: dict[str, Any] = {}
    kwargs = {
        "tables": Tables(torch.ones(2), torch.zeros(2)),
        "pair": (torch.ones(2), None),
        "state": state,
        "flag": False,
    }
    call = recorded(kwargs).calls[0][0]
    assert isinstance(call.kwargs["tables"], Tables) and isinstance(call.kwargs["pair"], tuple)
    assert call.kwargs["pair"][0] is call.kwargs["tables"].cosine
    assert call.kwargs["state"] is state and call.kwargs["flag"] is False


def test_hidden_states_go_back_the_way_they_came() -> None:
    recorder, hidden, other = Recorder(2), torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    recorder.record(0, (hidden, None, 7), {"flag": True})
    recorder.record(1, (), {"hidden_states": hidden, "flag": True})
    assert recorder.hidden == [hidden]
    assert recorder.calls[0][0].bind(other) == ((other, None, 7), {"flag": True})
    assert recorder.calls[1][0].bind(other) == ((), {"hidden_states": other, "flag": True})


def test_a_call_without_hidden_states_is_refused() -> None:
    with pytest.raises(CheckpointError, match="without hidden states"):
        Recorder(1).record(0, (), {"states": torch.ones(1)})
