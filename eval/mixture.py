"""Train the small mixture that expert removal is judged on: 16 experts a layer, 2 of them for a token.

    python -m eval.mixture [--steps 900]

A Qwen3-MoE of 11 M parameters learns from the text that the embedded model learned from, with its tokenizer, in about
12 minutes of one CPU core. It lies in the cache folder (`eval/mixture` below that of the compiled kernels), not in the
repository: what is there is not trained again, and an interrupted training goes on where it stood.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llmsparse.backends.cpu.build import cache_folder
from llmsparse.demo.new_model import BOS, EOS, VOCAB, WINDOW
from llmsparse.demo.train import Hyper, Run, Spent, held_out_loss

STEPS = 900  # of 4 windows of 512 tokens
COOLING = 300  # the last of them, in which the learning rate falls to 0 …
HORIZON = 1500  # … that would otherwise do so here
BALANCE = 0.01  # weight of the loss that keeps every expert in use, as in OLMoE (arXiv 2409.02060)


@dataclass(frozen=True)
class Cooling(Hyper):
    """A learning rate that falls slowly, and to 0 in the last steps."""

    def lr_now(self, done: Spent) -> float:
        slowly = self.lr * min((done.step + 1) / self.warmup, 1 - done.step / HORIZON)
        return slowly * min(1.0, (self.steps - done.step) / COOLING)


class MixtureRun(Run):
    """The embedded model's training, of a mixture."""

    def new_model(self) -> PreTrainedModel:
        ids = self.tokenizer.get_vocab()
        config = Qwen3MoeConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=768,  # of dense layers, of which there are none
            moe_intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            num_experts=16,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            max_position_embeddings=WINDOW,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=ids[BOS],
            eos_token_id=ids[EOS],
        )
        model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="eager")
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                torch.nn.init.zeros_(parameter)  # each block starts as the identity
        return model

    def loss(self, ids: Tensor) -> Tensor:
        output = self.model(input_ids=ids, use_cache=False, output_router_logits=True)
        logits = output.logits[:, :-1]  # (batch, WINDOW - 1, VOCAB)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + BALANCE * output.aux_loss

    def export(self, out: Path) -> None:
        """Write bf16 weights, config and tokenizer."""
        model: Any = Qwen3MoeForCausalLM(self.model.config).bfloat16()
        model.load_state_dict({name: value.bfloat16() for name, value in self.model.state_dict().items()})
        model.save_pretrained(out)
        self.tokenizer.save_pretrained(out)  # last: what is complete has one


def mixture_folder() -> Path:
    return cache_folder() / "eval" / "mixture"


def trained_mixture(steps: int = STEPS) -> Path:
    """The folder of the trained mixture; trained now where it is not there."""
    folder = mixture_folder()
    if (folder / "tokenizer_config.json").exists():
        return folder
    run = MixtureRun(Cooling(steps=steps, batch=4), folder.with_name("mixture-state"), "cpu")
    if (run.state / "state.pt").exists():
        run.resume()
    run.train(every=200)
    run.export(folder)
    print(f"held-out loss {held_out_loss(run.model, run.evaluation):.4f}", flush=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    print(trained_mixture(parser.parse_args().steps))


if __name__ == "__main__":
    main()
