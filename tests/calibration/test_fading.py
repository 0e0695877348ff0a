"""Weights that fade: the schedule, exact patterns, and that it beats a mask that was there from the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmsparse.calibration.fading import Fading, FadingWeight, at_once, rounds, score_of
from llmsparse.calibration.matching import match
from llmsparse.calibration.matching_loss import OutputError
from llmsparse.models.streamed import Activations, Block, StreamedModel
from llmsparse.sparsity.patterns import KeepingZeros, NofM, Pattern, Unstructured
from llmsparse.storage.checkpoint import CheckpointReader


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 200, 601])
def test_zeros_grow_by_a_falling_rate_and_all_are_there_while_steps_are_left(steps: int) -> None:
    schedule = rounds(steps)
    at, reached = list(schedule), list(schedule.values())
    assert at == sorted(at) and reached == sorted(reached) and reached[-1] == 1.0 and at[-1] < steps
    assert len(at) <= 31 and at[0] == 0 and (steps == 1 or reached[0] == pytest.approx(at_once(steps)))


def test_a_short_run_begins_with_more_of_the_zeros_than_a_long_one() -> None:
    assert [at_once(steps) for steps in (1, 50, 100, 150, 600)] == pytest.approx([0.9, 0.9, 0.8, 0.7, 0.7])


def test_an_expert_that_no_token_reached_is_scored_by_its_weights() -> None:
    values = torch.tensor([[1.0, -3.0, 2.0]])
    assert score_of(values, torch.tensor([2.0, 0.0, 1.0])).tolist() == [[2.0, 0.0, 2.0]]
    assert score_of(values, torch.zeros(3)).tolist() == [[1.0, 3.0, 2.0]]


@pytest.fixture
def dense(tiny_llama: Callable[..., Path], tmp_path: Path) -> tuple[Block, Activations]:
    model = StreamedModel(
        CheckpointReader(tiny_llama(tmp_path / "model")), device=torch.device("cpu"), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    return model.block(0), model.embed([torch.randint(0, 384, (4, 32), generator=generator) for _ in range(16)])


def pruned(block: Block, pattern: Callable[[Tensor], Pattern]) -> tuple[Fading, dict[str, Tensor]]:
    """The block without its smallest weights, what fades in their place, and the masks by parameter."""
    whole = {key: tensor.clone() for key, tensor in block.stored.items()}
    keep: dict[str, Tensor] = {}
    weights: list[FadingWeight] = []
    for weight in block.weights:
        view = block.view(weight)
        wanted = pattern(view)
        weights.append(FadingWeight(weight, wanted, torch.ones(weight.shape[1])))
        keep[weight.slot[0]] = wanted.keep(view.abs(), slice(0, weight.shape[1]), weight.shape[1])
        block.store(weight, view * keep[weight.slot[0]])
    block.reload()
    return Fading(weights, whole), keep


@pytest.mark.parametrize("pattern", [Unstructured(0.7, "matrix"), Unstructured(0.7, "row"), NofM(2, 4)])
def test_the_pattern_is_exact_and_the_output_nearer_than_with_a_frozen_mask(
    pattern: Pattern, dense: tuple[Block, Activations]
) -> None:
    block, acts = dense
    loss = OutputError(block.run(acts).hidden)
    fading, keep = pruned(block, lambda _: pattern)
    frozen = match(block, acts, loss, keep, steps=60, seed=0)
    faded = match(block, acts, loss, keep, steps=60, seed=0, fading=fading)
    assert faded.record.improved and faded.record.after < 0.7 * faded.record.before
    if isinstance(pattern, Unstructured):
        assert faded.record.after < frozen.record.after
    for name, mask in faded.keep.items():
        assert mask.sum() == keep[name].sum()
        assert not faded.values[name][~mask].any()
        assert torch.equal(mask, pattern.keep(mask.float(), slice(0, mask.shape[1]), mask.shape[1]))


def test_where_nothing_is_left_to_fade_it_is_the_run_with_the_frozen_mask(dense: tuple[Block, Activations]) -> None:
    block, acts = dense
    loss = OutputError(block.run(acts).hidden)
    fading, keep = pruned(block, lambda _: NofM(2, 4))  # all at once, in 16 steps
    ready = Fading(fading.weights, {key: tensor.clone() for key, tensor in block.stored.items()})
    frozen, faded = (match(block, acts, loss, keep, steps=16, seed=0, fading=fades) for fades in (None, ready))
    assert frozen.record == faded.record
    assert all(torch.equal(frozen.values[name], faded.values[name]) for name in keep)


def test_the_same_seed_fades_the_same_weights(dense: tuple[Block, Activations]) -> None:
    block, acts = dense
    loss = OutputError(block.run(acts).hidden)
    fading, keep = pruned(block, lambda _: Unstructured(0.6, "matrix"))
    first, second = (match(block, acts, loss, keep, steps=8, seed=1, fading=fading) for _ in range(2))
    assert all(torch.equal(first.values[name], second.values[name]) for name in keep)


def test_what_was_zero_stays_zero_where_it_is_to(dense: tuple[Block, Activations]) -> None:
    block, acts = dense
    loss = OutputError(block.run(acts).hidden)
    zeros = {weight.slot[0]: block.view(weight) > 0.02 for weight in block.weights}
    for weight in block.weights:
        block.view(weight).masked_fill_(zeros[weight.slot[0]], 0.0)
    fading, keep = pruned(block, lambda view: KeepingZeros(Unstructured(0.6, "matrix"), view == 0))
    faded = match(block, acts, loss, keep, steps=40, seed=0, fading=fading)
    assert faded.record.improved
    assert not any(faded.values[name][mask].any() for name, mask in zeros.items())


def test_weights_that_are_not_to_fade_stay_bit_for_bit(dense: tuple[Block, Activations]) -> None:
    block, acts = dense
    loss = OutputError(block.run(acts).hidden)
    fading, keep = pruned(block, lambda _: Unstructured(0.5, "matrix"))
    only = Fading(fading.weights[:1], fading.beginning)
    name = fading.weights[0].weight.slot[0]
    for other in block.weights[1:]:
        block.view(other).copy_(block.view(other, dict(fading.beginning)))
    block.reload()
    faded = match(block, acts, loss, {name: keep[name]}, steps=40, seed=0, fading=only)
    assert set(faded.values) == {name} and faded.keep[name].sum() == keep[name].sum()
