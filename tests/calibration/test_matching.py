"""Block matching on one block: what moves, what does not, and that it helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmsparse.calibration.matching import autocast_dtype, batches_per_step, match, shares
from llmsparse.calibration.matching_loss import OutputError
from llmsparse.models.streamed import Activations, Block, StreamedModel
from llmsparse.storage.checkpoint import CheckpointReader


@pytest.fixture
def prepared(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> tuple[Block, Activations, list[Tensor], dict[str, Tensor]]:
    """A block with the smaller half of its weights zeroed, its inputs, its dense outputs, and the keep-masks."""
    model = StreamedModel(
        CheckpointReader(tiny_llama(tmp_path / "model")), device=torch.device("cpu"), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    acts = model.embed([torch.randint(0, 384, (4, 32), generator=generator) for _ in range(16)])
    block = model.block(0)
    targets = block.run(acts).hidden
    keep: dict[str, Tensor] = {}
    for weight in block.weights:
        view = block.view(weight)
        keep[weight.slot[0]] = view.abs() > view.abs().median()
        block.store(weight, view * keep[weight.slot[0]])
    block.reload()
    return block, acts, targets, keep


def test_the_output_comes_back_to_the_dense_one_and_zeros_stay(
    prepared: tuple[Block, Activations, list[Tensor], dict[str, Tensor]],
) -> None:
    block, acts, targets, keep = prepared
    before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
    matched = match(block, acts, OutputError(targets), keep, steps=60, seed=0)
    tuned, result = matched.values, matched.record
    assert result.improved and all(torch.equal(matched.keep[name], keep[name]) for name in keep)
    assert result.after < 0.7 * result.before
    assert set(tuned) == set(keep)
    for name, value in tuned.items():
        assert value.dtype == torch.float32
        assert not value[~keep[name]].any()
        assert (value != before[name]).any()
    for name, parameter in block.module.named_parameters():
        assert torch.equal(parameter, before[name]) and not parameter.requires_grad, "the module is left as it was"


def test_the_record_is_the_error_that_the_tuned_weights_really_have(
    prepared: tuple[Block, Activations, list[Tensor], dict[str, Tensor]],
) -> None:
    block, acts, targets, keep = prepared
    matched = match(block, acts, OutputError(targets), keep, steps=20, seed=0)
    tuned, result = matched.values, matched.record
    with torch.no_grad():
        for name, value in tuned.items():
            block.module.get_parameter(name).copy_(value)
    outputs = block.run(acts).hidden
    error = ((outputs[8] - targets[8]).square().sum(-1) / targets[8].square().sum(-1)).mean().item()
    assert result.after == pytest.approx(error, rel=1e-4), "of the eighth batch: the first one chose"


def test_the_same_seed_gives_the_same_bits(
    prepared: tuple[Block, Activations, list[Tensor], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a step takes all batches there is nothing to draw, so here it takes a few."""
    block, acts, targets, keep = prepared
    monkeypatch.setattr("llmsparse.calibration.matching.TOKENS_PER_STEP", 512)
    first, second, other = (
        match(block, acts, OutputError(targets), keep, steps=5, seed=seed).values for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_block_that_cannot_improve_stays_as_it_was_pruned(
    prepared: tuple[Block, Activations, list[Tensor], dict[str, Tensor]],
) -> None:
    block, acts, _, keep = prepared
    own_outputs = block.run(acts).hidden
    matched = match(block, acts, OutputError(own_outputs), keep, steps=10, seed=0)
    tuned, result = matched.values, matched.record
    assert not result.improved and result.before == result.after == pytest.approx(0, abs=1e-9)
    for name, value in tuned.items():
        assert torch.equal(value, block.module.get_parameter(name))


def test_weights_start_from_what_is_stored_not_from_the_module_that_rounds_it(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    reader = CheckpointReader(tiny_llama(tmp_path / "model"))
    model = StreamedModel(reader, device=torch.device("cpu"), dtype=torch.bfloat16)
    block, acts = model.block(0), model.embed([torch.arange(32)[None] + j for j in range(2)])
    keep = {weight.slot[0]: torch.ones(weight.shape, dtype=torch.bool) for weight in block.weights}
    loss = OutputError(block.run(acts).hidden)
    tuned = match(block, acts, loss, keep, steps=0, seed=0, autocast=torch.bfloat16).values
    for weight in block.weights:
        assert torch.equal(tuned[weight.slot[0]], block.view(weight))


@pytest.mark.parametrize("scaled", [1.0, 2e4])
def test_a_model_that_computes_in_float16_is_matched_too(
    scaled: float, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Activations are those of a large model in size: float16 holds them, and none of the gradients of their error."""
    reader = CheckpointReader(tiny_llama(tmp_path / "model", dtype=torch.float16))
    model = StreamedModel(reader, device=torch.device("cpu"), dtype=torch.float16)
    generator = torch.Generator().manual_seed(0)
    acts = model.embed([torch.randint(0, 384, (4, 64), generator=generator) for _ in range(16)])
    block = model.block(0)
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        block.stored[f"model.layers.0.{name}"] *= scaled
    acts = acts.like([hidden * scaled for hidden in acts.hidden])
    block.reload()
    targets = block.run(acts).hidden
    assert all(target.isfinite().all() for target in targets)
    keep = {weight.slot[0]: block.view(weight).abs() > block.view(weight).abs().median() for weight in block.weights}
    for weight in block.weights:
        block.store(weight, block.view(weight) * keep[weight.slot[0]])
    block.reload()
    autocast = autocast_dtype(torch.float16, torch.device("cpu"))
    assert autocast == torch.bfloat16
    matched = match(block, acts, OutputError(targets), keep, steps=40, seed=0, autocast=autocast)
    tuned, result = matched.values, matched.record
    assert result.improved and result.after < 0.9 * result.before
    for weight in block.weights:
        value, before = tuned[weight.slot[0]], block.view(weight).float()
        assert not value[~keep[weight.slot[0]]].any()
        assert (value != before).sum() > 0.9 * keep[weight.slot[0]].sum(), "gradients are not 0"


def test_float32_is_matched_as_it_is() -> None:
    assert autocast_dtype(torch.float32, torch.device("cpu")) is None
    assert autocast_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16


def test_weights_that_may_not_move_do_not(
    prepared: tuple[Block, Activations, list[Tensor], dict[str, Tensor]],
) -> None:
    block, acts, targets, keep = prepared
    free = keep["mlp.up_proj.weight"].clone()
    free[:10] = False
    tuned = match(block, acts, OutputError(targets), {"mlp.up_proj.weight": free}, steps=10, seed=0).values
    assert torch.equal(tuned["mlp.up_proj.weight"][:10], block.module.get_parameter("mlp.up_proj.weight")[:10])


def test_a_single_batch_is_said_to_be_trained_on(
    prepared: tuple[Block, Activations, list[Tensor], dict[str, Tensor]],
) -> None:
    block, acts, targets, keep = prepared
    for batches, validated in ((2, True), (1, False)):
        few, loss = Activations(acts.hidden[:batches], acts.calls), OutputError(targets)
        assert match(block, few, loss, keep, steps=0, seed=0).record.validation is validated


def test_windows_that_choose_are_not_those_that_report_nor_those_that_are_trained_on() -> None:
    assert shares(17) == ([0, 16], [8], [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15])
    assert shares(8) == ([0], [0], [1, 2, 3, 4, 5, 6, 7]) and shares(1) == ([0], [0], [0])


@pytest.mark.parametrize(
    ("shape", "batches"), [((2, 256, 64), 2), ((1, 2048, 64), 1), ((1, 2048, 4096), 2), ((64, 256, 64), 1)]
)
def test_a_step_sees_1024_tokens_or_as_many_as_the_width(shape: tuple[int, int, int], batches: int) -> None:
    assert batches_per_step(*shape, most=1000) == batches
    assert batches_per_step(*shape, most=1) == 1, "no window twice in a step"
