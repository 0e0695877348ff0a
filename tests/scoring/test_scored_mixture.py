"""Experts seen at work: nothing changes by being watched, and what is seen is what each computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmsparse.errors import CheckpointError
from llmsparse.models.streamed import Block
from llmsparse.scoring.mixture import Call, Routed, find_mixture, intercepted
from tests.architectures import MIXTURE, save_random, stream, tiny_config, windows

FAMILIES = [*MIXTURE, "jamba", "qwen3_next"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_watched_block_computes_what_it_does_unwatched(name: str, tmp_path: Path) -> None:
    model = stream(save_random(tiny_config(name), tmp_path))
    acts = model.embed(windows((2, 16)))
    watched = 0
    for block in model.blocks():
        mixture = find_mixture(model, block.index)
        plain = block.run(acts)
        if mixture is not None:
            seen: list[Routed] = []

            def observe(call: Call, seen: list[Routed] = seen) -> Tensor:
                seen.append(call.observe())
                together = torch.zeros_like(seen[-1].output)
                for expert in range(4):
                    tokens, weights = call.sent(expert)
                    output = call.run(expert, tokens)
                    together[tokens] += weights[:, None] * output
                    norms = seen[-1].norms.T[(call.index == expert).T] * seen[-1].gates.T[(call.index == expert).T]
                    torch.testing.assert_close((weights[:, None] * output).norm(dim=-1), norms)
                torch.testing.assert_close(together, seen[-1].output)
                return seen[-1].returned

            with intercepted(block, mixture, observe):
                again = block.run(acts)
            assert torch.equal(plain.hidden[0], again.hidden[0])
            assert [len(routed.index) for routed in seen] == [32]
            assert mixture.experts == 4 and mixture.down.endswith("down_proj")
            watched += 1
        acts = plain
    assert watched


def test_gates_and_norms_are_those_of_the_models_formula(tmp_path: Path) -> None:
    """qwen3_moe by hand: softmax, the two largest, divided by their sum where the config says so."""
    model = stream(save_random(tiny_config("qwen3_moe", norm_topk_prob=True), tmp_path))
    block, routed, x = seen_first(model)
    mlp = block.module.get_submodule("mlp")
    p = torch.softmax(x @ mlp.get_parameter("gate.weight").T, -1)
    values, index = p.topk(2)
    torch.testing.assert_close(routed.index.sort(-1).values, index.sort(-1).values)
    torch.testing.assert_close(routed.gates.sort(-1).values, (values / values.sum(-1, keepdim=True)).sort(-1).values)
    gate_up, down = mlp.get_parameter("experts.gate_up_proj"), mlp.get_parameter("experts.down_proj")
    for token in range(len(x)):
        for place, expert in enumerate(routed.index[token].tolist()):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            f = down[expert] @ (torch.nn.functional.silu(gate) * up)
            torch.testing.assert_close(routed.norms[token, place], f.norm())


def test_experts_whose_inputs_are_weighed_are_seen_with_their_gates(tmp_path: Path) -> None:
    """llama4 by hand: the sigmoid of the largest logit times the input, one expert a token."""
    model = stream(save_random(tiny_config("llama4_text"), tmp_path))
    block, routed, x = seen_first(model)
    mixture = find_mixture(model, 0)
    assert mixture is not None and mixture.weighs_inputs
    experts = block.module.get_submodule(mixture.path)
    router = block.module.get_submodule(mixture.path.rpartition(".")[0]).get_parameter("router.weight")
    logits, index = (x @ router.T).max(-1)
    assert routed.index[:, 0].tolist() == index.tolist()
    torch.testing.assert_close(routed.gates[:, 0], logits.sigmoid())
    gate_up, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
    for token, expert in enumerate(index.tolist()):
        gate, up = ((logits[token].sigmoid() * x[token]) @ gate_up[expert]).chunk(2)
        added = (up * torch.nn.functional.silu(gate)) @ down[expert]
        torch.testing.assert_close(routed.gates[token, 0] * routed.norms[token, 0], added.norm())


def test_a_block_without_experts_has_none(tmp_path: Path) -> None:
    model = stream(save_random(tiny_config("deepseek_v3"), tmp_path))
    assert find_mixture(model, 0) is None and find_mixture(model, 1) is not None


def test_experts_that_take_something_else_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stream(save_random(tiny_config("mixtral"), tmp_path))
    kind = type(model.module(0, "mlp.experts"))
    monkeypatch.setattr(kind, "forward", lambda self, hidden, other: hidden)
    with pytest.raises(CheckpointError, match=r"the experts of model.layers.0 take hidden, other; wanted tokens, or"):
        find_mixture(model, 0)


def seen_first(model: object) -> tuple[Block, Routed, Tensor]:
    """The first block, what its experts were seen to do, and what entered them (tokens, width)."""
    acts = model.embed(windows((2, 16)))  # pyright: ignore
    block, mixture = model.block(0), find_mixture(model, 0)  # pyright: ignore
    assert mixture is not None
    seen: list[Routed] = []
    entering: list[Tensor] = []
    mlp = block.module.get_submodule(mixture.path.rpartition(".")[0])
    hook = mlp.register_forward_pre_hook(lambda module, args: entering.append(args[0].reshape(-1, args[0].shape[-1])))

    def observe(call: Call) -> Tensor:
        seen.append(call.observe())
        return seen[-1].returned

    with intercepted(block, mixture, observe), torch.no_grad():
        block.call(acts, 0)
    hook.remove()
    return block, seen[0], entering[0]
