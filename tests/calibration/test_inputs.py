"""Pass 1: who shares an input, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsparse.calibration.inputs import calibrate, learn_inputs, sample_rows
from llmsparse.errors import CheckpointError, NumericalError
from llmsparse.models.streamed import Activations, Block, StreamedModel
from llmsparse.sparsity.stats import Gram
from llmsparse.storage.checkpoint import CheckpointReader
from tests.architectures import save_random, stream, tiny_config, windows

CPU = torch.device("cpu")


@pytest.fixture
def loaded(tiny_llama: Callable[..., Path], tmp_path: Path) -> tuple[Block, Activations]:
    model = StreamedModel(CheckpointReader(tiny_llama(tmp_path / "model")), device=CPU, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    return model.block(0), model.embed([torch.randint(0, 384, (4, 64), generator=generator) for _ in range(32)])


def roles(block: Block, acts: Activations) -> list[set[str]]:
    inputs = learn_inputs(block, acts, block.weights)
    return [{weight.name.rpartition(".")[2] for weight in entry.weights} for entry in inputs]


def test_weights_of_one_input_share_it_in_call_order(loaded: tuple[Block, Activations]) -> None:
    assert roles(*loaded) == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]


def test_every_token_counts_once_and_the_gram_is_that_of_the_real_input(loaded: tuple[Block, Activations]) -> None:
    block, acts = loaded
    inputs = learn_inputs(block, acts, block.weights)
    calibrate(block, acts, inputs, lambda entry: Gram, device=CPU, seed=0)
    x = torch.cat([block.module.input_layernorm(hidden) for hidden in acts.hidden]).flatten(0, 1).double()
    gram = inputs[0].statistic
    assert isinstance(gram, Gram) and gram.tokens == inputs[0].tokens == 32 * 4 * 64
    torch.testing.assert_close(gram.xtx.double(), x.T @ x, rtol=1e-5, atol=1e-3)


def test_the_sample_is_seeded_bounded_and_made_of_real_rows(loaded: tuple[Block, Activations]) -> None:
    block, acts = loaded
    samples = []
    for seed in (0, 0, 1):
        inputs = learn_inputs(block, acts, block.weights)
        calibrate(block, acts, inputs, lambda entry: None, device=CPU, seed=seed)
        samples.append(inputs[0].sample)
    assert samples[0].shape == (256, 32)
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    rows = {
        tuple(row) for row in torch.cat([block.module.input_layernorm(h) for h in acts.hidden]).flatten(0, 1).tolist()
    }
    assert all(tuple(row) in rows for row in samples[0][:50].tolist())


def test_experts_that_the_first_batch_does_not_reach_share_no_input(tmp_path: Path) -> None:
    config = tiny_config("llama4_text", num_local_experts=8, interleave_moe_layer_step=1)
    model = stream(save_random(config, tmp_path))
    block, acts = model.block(0), model.embed(windows(*[(1, 2)] * 20))
    inputs = learn_inputs(block, acts, [weight for weight in block.weights if weight.kind == "expert"])
    assert len(inputs) == 16 and all(len(entry.slots) == 1 for entry in inputs)
    calibrate(block, acts, inputs, lambda entry: Gram, device=CPU, seed=0)
    for entry in inputs:
        assert isinstance(entry.statistic, Gram) and entry.statistic.tokens == entry.tokens
        assert not entry.tokens or len(entry.sample) == entry.tokens
    entering = [entry.tokens for entry in inputs if entry.slots[0][0].endswith("gate_up_proj")]
    assert sum(entering) == 40 and sum(tokens > 0 for tokens in entering) > 2, "two tokens reach two experts at most"


def test_the_outputs_of_a_block_come_of_the_same_pass_where_they_are_wanted(
    loaded: tuple[Block, Activations],
) -> None:
    block, acts = loaded
    behind, alone, both = block.run(acts).hidden, learn_inputs(block, acts, block.weights), acts.like(list(acts.hidden))
    calibrate(block, acts, alone, lambda entry: Gram, device=CPU, seed=0)
    inputs = learn_inputs(block, both, block.weights)
    calibrate(block, both, inputs, lambda entry: Gram, device=CPU, seed=0, into=both)
    assert all(torch.equal(one, other) for one, other in zip(both.hidden, behind, strict=True))
    for one, other in zip(inputs, alone, strict=True):
        assert isinstance(one.statistic, Gram) and isinstance(other.statistic, Gram)
        assert torch.equal(one.statistic.xtx, other.statistic.xtx) and torch.equal(one.sample, other.sample)


@pytest.mark.parametrize(("tokens", "rows"), [(100, 256), (8192, 256), (65536, 2048), (262144, 4096)])
def test_the_sample_is_a_small_share_of_the_calibration_and_never_more_than_4096(tokens: int, rows: int) -> None:
    assert sample_rows(tokens) == rows


def test_activations_that_are_not_finite_are_an_error_that_names_the_weight(loaded: tuple[Block, Activations]) -> None:
    block, acts = loaded
    block.module.input_layernorm.weight.data[3] = float("nan")
    inputs = learn_inputs(block, acts, block.weights)
    with pytest.raises(NumericalError, match=r"enter model\.layers\.0\.self_attn\.q_proj are NaN or Inf"):
        calibrate(block, acts, inputs, lambda entry: None, device=CPU, seed=0)


def test_weights_that_stop_sharing_their_input_are_an_error_that_names_both(
    loaded: tuple[Block, Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, acts = loaded
    inputs = learn_inputs(block, acts, block.weights)
    mlp: Any = block.module.mlp
    own, calls = mlp.up_proj.forward, iter(range(100))
    monkeypatch.setattr(mlp.up_proj, "forward", lambda x: own(x if next(calls) < 3 else x.clone()))
    with pytest.raises(CheckpointError, match=r"up_proj: has the input of .*gate_proj in one batch .* --exclude"):
        calibrate(block, acts, inputs, lambda entry: None, device=CPU, seed=0)


def test_a_weight_that_is_used_twice_has_one_input_made_of_both_uses(
    loaded: tuple[Block, Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, acts = loaded
    mlp: Any = block.module.mlp

    def forward(x: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) + mlp.up_proj(3 * x))

    monkeypatch.setattr(mlp, "forward", forward)
    inputs = learn_inputs(block, acts, block.weights)
    by_role = {weight.name.rpartition(".")[2]: entry for entry in inputs for weight in entry.weights}
    assert sum(len(entry.weights) for entry in inputs) == 7, "each weight once"
    assert [weight.name.rpartition(".")[2] for weight in by_role["up_proj"].weights] == ["up_proj"]
    calibrate(block, acts, inputs, lambda entry: Gram, device=CPU, seed=0)
    once, twice = by_role["gate_proj"], by_role["up_proj"]
    assert isinstance(once.statistic, Gram) and isinstance(twice.statistic, Gram)
    assert twice.tokens == 2 * once.tokens
    torch.testing.assert_close(twice.statistic.xtx, 10 * once.statistic.xtx, rtol=1e-5, atol=1e-3)


def test_a_batch_ends_with_the_last_input_that_is_wanted_and_every_statistic_is_the_same(
    loaded: tuple[Block, Activations],
) -> None:
    block, acts = loaded
    ran: list[str] = []
    for name, part in block.module.named_modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda *_, name=name: ran.append(name.rpartition(".")[2]))
    early, whole = (learn_inputs(block, acts, block.weights) for _ in range(2))
    ran.clear()
    calibrate(block, acts, early, lambda entry: Gram, device=CPU, seed=0)
    assert ran.count("up_proj") == 32 and "down_proj" not in ran, "what enters it is known, what leaves it nobody wants"
    for entry in whole:
        entry.calls = None
    calibrate(block, acts, whole, lambda entry: Gram, device=CPU, seed=0)
    assert ran.count("down_proj") == 32
    for one, other in zip(early, whole, strict=True):
        assert one.tokens == other.tokens and torch.equal(one.sample, other.sample)
        assert isinstance(one.statistic, Gram) and isinstance(other.statistic, Gram)
        assert torch.equal(one.statistic.xtx, other.statistic.xtx)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_no_batch_ends_early_where_a_router_decides_what_runs(kind: str, tmp_path: Path) -> None:
    model = stream(save_random(tiny_config(kind), tmp_path))
    block, acts = model.block(0), model.embed(windows(*[(1, 4)] * 12))
    for weights in ([w for w in block.weights if w.kind == "linear"], [w for w in block.weights if w.kind == "expert"]):
        assert all(entry.calls is None for entry in learn_inputs(block, acts, weights))
