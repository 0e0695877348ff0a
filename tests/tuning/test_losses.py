"""Each term against a hand-worked number, and whose gradient reaches the router."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmsparse.factorization.oracle import greedy
from llmsparse.tuning.distillation import Distillation, load_both
from llmsparse.tuning.losses import (
    TERMS,
    balance,
    greedy_loss,
    kl,
    language,
    layer_error,
    norm_loss,
    prior_approximate_loss,
)
from llmsparse.tuning.plan import TunePlan, make_plan
from llmsparse.tuning.recipe import TuneRecipe
from llmsparse.tuning.trainable import Trainable
from llmsparse.tuning.training import losses


def test_divergence_of_two_coins() -> None:
    """KL((1/2, 1/2) ‖ (3/4, 1/4)) = ½ ln(2/3) + ½ ln 2; and 0 of a model from itself."""
    student, teacher = torch.tensor([[[3.0, 1.0]]]).log(), torch.tensor([[[1.0, 1.0]]])
    assert kl(student, teacher).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    logits = torch.randn(2, 3, 7)
    assert kl(logits, logits).item() == pytest.approx(0, abs=1e-6)


def test_language_is_the_loss_of_the_tokens_after_the_first() -> None:
    logits = torch.tensor([[[1.0, 3.0], [9.0, 9.0], [0.0, 0.0]]]).log()
    assert language(logits, torch.tensor([[0, 1, 0]])).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_a_loud_token_weighs_no_more_than_a_quiet_one() -> None:
    target = torch.tensor([[3.0, 4.0], [3000.0, 4000.0]])
    assert layer_error(target * torch.tensor([[2.0], [1.0]]), target).item() == pytest.approx(0.5)


def test_balance_is_zero_for_equal_shares_and_largest_for_one_expert() -> None:
    flat = torch.zeros(4, 4)
    assert balance(flat, torch.arange(4)[:, None]).item() == pytest.approx(0)
    one = torch.tensor([[100.0, 0, 0, 0]]).repeat(4, 1)
    assert balance(one, torch.zeros(4, 1, dtype=torch.int64)).item() == pytest.approx(3)


def test_greedy_takes_what_leaves_least_of_the_target() -> None:
    """The loudest first expert overshoots; two that add up to the target are found instead of it."""
    outputs = torch.tensor([[[5.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    chosen = greedy(outputs, 2, torch.tensor([[1.0, 1.0]]))
    assert chosen.tolist() == [[False, True, True]]
    assert greedy(outputs, 1).tolist() == [[True, False, False]], "without a target it is their sum, (6, 1.1)"


class TwoExperts:
    """What the router losses ask of a Mixture: both add a fixed vector to every token, and a score that is trained."""

    active, routed = 1, 2

    def __init__(self, first: list[float], second: list[float]) -> None:
        self._outputs = torch.tensor([first, second])
        self.weight = torch.zeros(2, requires_grad=True)

    def expert_outputs(self, x: Tensor) -> Tensor:
        return self._outputs.expand(len(x), 2, 2)

    def shared_output(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def logits(self, x: Tensor) -> Tensor:
        return self.weight.expand(len(x), 2)

    def scores(self, logits: Tensor) -> Tensor:
        return logits


@pytest.mark.parametrize(
    ("loss", "value"),
    [(greedy_loss, math.log(2)), (norm_loss, math.log(2)), (prior_approximate_loss, 0.120115)],
)
def test_router_losses_at_the_start_and_whom_they_favour(loss: Any, value: float) -> None:
    """y = (1, 0): the first expert gives it, the second is louder. An undecided router is at ln 2 of cross-entropy, and
    at 0.120 from softmax(1, 0), FactorLLM's target."""
    mixture = TwoExperts([1.0, 0.0], [0.0, 2.0])
    got = loss(mixture, torch.ones(3, 2), torch.tensor([[1.0, 0.0]]).repeat(3, 1))
    assert got.item() == pytest.approx(value, abs=1e-5)
    got.backward()
    favoured = -mixture.weight.grad
    assert (favoured[0] > favoured[1]) == (loss is not norm_loss)


@pytest.fixture(params=["glm4_moe", "mixtral"])
def ready(
    request: pytest.FixtureRequest, mixtures: dict[str, Path], keys: dict[str, Any], tmp_path: Path
) -> SimpleNamespace:
    weights = {f"{name}_weight": 1.0 for name in TERMS}
    plan: TunePlan = make_plan(
        TuneRecipe(model=str(mixtures[request.param]), output=str(tmp_path / "out"), **keys, **weights)
    )
    distillation: Distillation = load_both(plan)
    ids = plan.windows.ids[:8]
    distillation.sharpen(ids)
    trainable = Trainable(distillation.student, distillation.mixtures, "experts", 16, 0)
    return SimpleNamespace(plan=plan, distillation=distillation, ids=ids, trainable=trainable)


def test_every_term_gives_the_router_a_gradient(ready: SimpleNamespace) -> None:
    """The released FactorLLM leaves `router.weight.grad` at None after any of its losses."""
    terms = losses(ready.distillation, ready.ids, ready.plan)
    for name, term in terms.items():
        for parameter in ready.trainable.parameters.values():
            parameter.grad = None
        term.backward(retain_graph=True)
        for router, parameter in ready.trainable.routers.items():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, (name, router)
    own = {name: [weight.grad is not None for weight in ready.trainable.experts.values()] for name in ("language",)}
    assert all(own["language"])
    assert ready.distillation.teacher.model.embed_tokens.weight.grad is None


def test_the_router_is_judged_on_what_enters_the_teachers_ffn(ready: SimpleNamespace) -> None:
    """Layer 1: its input is what the dense model has behind residual, attention and norm, not layer 0's FFN output."""
    seen = ready.distillation.see(ready.ids)
    entered: list[Tensor] = []
    block = ready.distillation.teacher.model.layers[1]
    handle = block.post_attention_layernorm.register_forward_hook(lambda _, args, output: entered.append(output))
    ready.distillation.teacher(ready.ids)
    handle.remove()
    assert torch.equal(seen.entered[1], entered[0].flatten(0, 1))
    assert torch.equal(seen.wanted[1], block.mlp(entered[0]).flatten(0, 1))


def test_no_graph_lives_longer_than_the_losses_made_of_it(ready: SimpleNamespace) -> None:
    """Held-out text is measured right behind a step: what the hooks still held of it would lie beside that."""

    def parts_of_graphs() -> int:
        gc.collect()
        return sum(type(one) is Tensor and one.grad_fn is not None for one in gc.get_objects())

    before = parts_of_graphs()
    terms = losses(ready.distillation, ready.ids, ready.plan)
    assert parts_of_graphs() > before
    del terms
    assert parts_of_graphs() == before
    ran = [int(load.sum()) for load in ready.distillation.loads()]
    assert ran == [ready.ids.numel() * mixture.active for mixture in ready.distillation.mixtures]
