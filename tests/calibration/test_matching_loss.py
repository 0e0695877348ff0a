"""What matching makes small, against the same in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llmsparse.calibration import matching_loss
from llmsparse.calibration.matching_loss import LogitDivergence, OutputError
from llmsparse.models.streamed import StreamedModel
from llmsparse.storage.checkpoint import CheckpointReader


def test_every_token_counts_by_its_own_norm() -> None:
    target = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    output = target + torch.tensor([[[0.0, 5.0], [0.0, 500.0]]])
    assert OutputError([target])(output, 0).item() == pytest.approx(1.0)
    assert OutputError([target, target])(target, 1).item() == 0


@pytest.fixture
def finished(tiny_llama: Callable[..., Path], tmp_path: Path) -> tuple[StreamedModel, Tensor, Tensor]:
    """A model, and two hidden states behind its last block."""
    reader = CheckpointReader(tiny_llama(tmp_path / "model"))
    model = StreamedModel(reader, device=torch.device("cpu"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    target, output = (torch.randn(2, 7, model.hidden_size, generator=generator) for _ in range(2))
    return model, target, output


def test_the_divergence_is_that_of_the_next_token(finished: tuple[StreamedModel, Tensor, Tensor]) -> None:
    model, target, output = finished
    p, q = (np.exp(model.logits(hidden).double().numpy()) for hidden in (target, output))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    wanted = (p * np.log(p / q)).sum(-1).mean()
    assert LogitDivergence(model, [target])(output, 0).item() == pytest.approx(wanted, rel=1e-4)
    assert LogitDivergence(model, [target])(target, 0).item() == pytest.approx(0, abs=1e-6)


def test_parts_of_the_logits_give_the_loss_and_the_gradient_of_the_whole(
    finished: tuple[StreamedModel, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target, output = finished
    found: list[tuple[Tensor, Tensor]] = []
    for at_once in (2**23, 4 * model.vocabulary):  # seven tokens in one part, and in four
        monkeypatch.setattr(matching_loss, "LOGITS_AT_ONCE", at_once)
        leaf = output.clone().requires_grad_()
        loss = LogitDivergence(model, [target])(leaf, 0)
        loss.backward()
        assert leaf.grad is not None and leaf.grad.any()
        found.append((loss.detach(), leaf.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
