from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.router import ROUTERS, Router, RouterTask, Scores, expert_outputs, shipped, top
from llmsparse.factorization.split import Split

WIDTH, ROUTED = 16, 6


def task(steps: int = 200, affine: bool = True, active: int = 1) -> RouterTask:
    """Experts of 4 neurons that answer to directions of their own: a linear router can tell them apart."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.eye(WIDTH)[:ROUTED].repeat_interleave(4, 0) * 3 - 1
    up, down = torch.randn(2, 24, WIDTH, generator=generator)
    split = Split(torch.empty(0, dtype=torch.int64), tuple(torch.arange(24).split(4)))
    x = torch.randn(600, WIDTH, generator=generator)
    return RouterTask(FFN(gate, up, down.T.contiguous()), split, x, active, affine, steps, generator)


def agreement(taught: RouterTask, scores: Scores) -> float:
    """Share of the experts with the largest outputs that the scores choose."""
    wanted = top(expert_outputs(taught.ffn, taught.split, taught.x).norm(dim=-1), taught.active)
    return float((top(scores(taught.x), taught.active) & wanted).sum() / wanted.sum())


@pytest.mark.parametrize("affine", [True, False])
def test_training_finds_the_experts_with_the_largest_outputs(affine: bool) -> None:
    """1 of 6 is right by chance."""
    taught = task(affine=affine, active=2)
    assert agreement(taught, ROUTERS["linear"](taught)) > agreement(taught, ROUTERS["random"](taught)) + 0.2
    assert affine or not ROUTERS["linear"](taught).bias.any()


def test_the_mean_gate_direction_is_what_it_says() -> None:
    taught = task()
    scores = ROUTERS["gate-mean"](taught)
    rows = taught.ffn.gate[taught.split.routed[2]]
    torch.testing.assert_close(scores.weight[2], (rows / rows.norm(dim=1, keepdim=True)).mean(0))
    assert not scores.bias.any()


def test_prior_approximate_loss_falls_as_in_the_paper() -> None:
    """KL(softmax r ‖ softmax T) written out as the released DistillLoss does: Σ input · log(input / target)."""
    taught = task(active=2)
    outputs, dense = expert_outputs(taught.ffn, taught.split, taught.x), taught.ffn(taught.x)
    distance = (outputs - dense[:, None] / (ROUTED // 2)).square().mean(-1)
    target = top(-distance, 2).float().softmax(1)

    def loss(scores: Scores) -> float:
        gate = scores(taught.x).softmax(1)
        return float((gate * (gate / target).log()).sum(1).mean())

    untrained = Scores(torch.zeros(ROUTED, WIDTH), torch.zeros(ROUTED))
    assert loss(ROUTERS["prior-approximate"](taught)) < 0.9 * loss(untrained)


def container_router(kind: str, router: Router) -> Any:
    """The router of transformers' own model, with our weights."""
    fields = {"hidden_size": WIDTH, "num_experts_per_tok": router.active, "num_hidden_layers": 1}
    if kind == "glm4_moe":
        from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

        module = Glm4MoeTopkRouter(CONFIG_MAPPING[kind](n_routed_experts=ROUTED, **fields))
        module.e_score_correction_bias.copy_(router.bias)
    else:
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

        module = MixtralTopKRouter(CONFIG_MAPPING[kind](num_local_experts=ROUTED, **fields))
    module.weight.data.copy_(router.weight)
    return module


@pytest.mark.parametrize("kind", ["glm4_moe", "mixtral"])
def test_gates_are_those_of_the_container(kind: str) -> None:
    taught = task(active=2)
    scores = ROUTERS["linear"](taught)
    router = shipped(scores, taught.x, "sigmoid" if kind == "glm4_moe" else "softmax", 2, torch.bfloat16)
    with torch.no_grad():
        _, weights, indices = container_router(kind, router)(taught.x)
    expected = torch.zeros(len(taught.x), ROUTED).scatter_(1, indices, 2 * weights)
    torch.testing.assert_close(router.gates(taught.x), expected)


@pytest.mark.parametrize("formula", ["sigmoid", "softmax"])
def test_stored_routers_choose_as_the_scores_do_and_weigh_all_alike(formula: Any) -> None:
    taught = task(affine=formula == "sigmoid", active=2)
    scores = ROUTERS["linear"](taught)
    router = shipped(scores, taught.x, formula, 2, torch.float32)
    gates = router.gates(taught.x)
    assert ((gates > 0) == top(scores(taught.x), 2)).float().mean() > 0.999
    assert (gates[gates > 0] - 1).abs().max() < 0.01


def test_bias_alone_decides_in_a_sigmoid_router() -> None:
    scores = Scores(torch.zeros(3, 4), torch.tensor([0.0, 2.0, 1.0]))
    gates = shipped(scores, torch.randn(9, 4), "sigmoid", 1, torch.float32).gates(torch.randn(5, 4))
    assert gates.tolist() == [[0.0, 1.0, 0.0]] * 5


def test_with_every_expert_active_the_weights_are_exactly_equal() -> None:
    taught = task(steps=5)
    router = shipped(ROUTERS["linear"](taught), taught.x, "softmax", ROUTED, torch.float32)
    assert torch.equal(router.gates(taught.x), torch.ones(len(taught.x), ROUTED))


def test_half_precision_keeps_enough_of_the_scores() -> None:
    taught = task(active=2)
    scores = ROUTERS["linear"](taught)
    router = shipped(scores, taught.x, "sigmoid", 2, torch.float16)
    assert torch.equal(router.weight, router.weight.half().float())
    assert ((router.gates(taught.x) > 0) == top(scores(taught.x), 2)).float().mean() > 0.99
