"""Train the model that ships with `llmsparse`: a 7 M parameter Llama that writes Python.

    python -m llmsparse.demo.train --out llmsparse/demo/model

Its text is the standard library (`text/builtin.py`), so the whole artefact can be rebuilt from this file and a Python
install, in about an hour on two CPU cores that multiply bf16, in minutes on a GPU. AdamW throughout, as for the models
that people prune: its large and uneven weights and activations are what pruning methods are made for (docs/LOG.md).
Weights are fp32 with products in bf16, and rounded to bf16 once, when exported.

State is saved as it goes. `--resume` continues from it; with a smaller `--steps` or `--minutes` the learning rate
falls early, and with nothing left of either it only exports.
"""

# torch and transformers are typed in part only:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from llmsparse.demo.new_model import VOCAB, WINDOW, new_model, train_tokenizer
from llmsparse.text import builtin as corpus


@dataclass
class Spent:
    """What has been spent so far, across resumes."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Hyper:
    """What shapes the run, besides the model."""

    steps: int
    minutes: float = math.inf  # of stepping; the schedule follows whichever of the two runs out first
    batch: int = 8  # windows per step; at a few million tokens more steps are worth more than smoother gradients
    lr: float = 3e-3
    weight_decay: float = 0.1  # of matrices; norms have none
    warmup: int = 100  # steps
    clip: float = 1.0
    seed: int = 0

    def left(self, done: Spent) -> float:
        """The fraction of the run still ahead, at most 0 at its end."""
        return 1 - max(done.step / self.steps, done.seconds / (60 * self.minutes))

    def lr_now(self, done: Spent) -> float:
        """Warm up, then fall linearly to 0 over the whole run."""
        return self.lr * min((done.step + 1) / self.warmup, self.left(done))


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Tensor:
    """All texts as one row of ids: bos, text, eos, bos, text, ..."""
    rows = [torch.tensor([*tokenizer.encode(text), tokenizer.eos_token_id]) for text in texts]
    return torch.cat(rows)


def batches(stream: Tensor, hyper: Hyper, start: int) -> Iterator[Tensor]:
    """The batches from step `start` on, each (batch, WINDOW), the same whether or not the run was resumed.

    Every epoch cuts the stream at a new offset and shuffles the windows.
    """
    per_epoch = (len(stream) // WINDOW - 1) // hyper.batch
    for step in count(start):
        epoch, index = divmod(step, per_epoch)
        rng = torch.Generator().manual_seed(hyper.seed * 1000 + epoch)
        offset = int(torch.randint(WINDOW, (1,), generator=rng))
        order = torch.randperm(per_epoch * hyper.batch, generator=rng)
        firsts = offset + WINDOW * order[index * hyper.batch : (index + 1) * hyper.batch]
        yield stream[firsts[:, None] + torch.arange(WINDOW)]


def next_token_loss(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Mean cross-entropy over the WINDOW - 1 predictions in each window of ids (batch, WINDOW)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (batch, WINDOW - 1, VOCAB)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Callable[..., Any], stream: Tensor, batch: int = 8) -> float:
    """Loss over non-overlapping windows of the stream; what does not fill the last window is left out."""
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = [next_token_loss(model, part).item() * len(part) for part in windows.split(batch)]
    return sum(losses) / len(windows)


def build_optimizer(model: PreTrainedModel, hyper: Hyper) -> torch.optim.Optimizer:
    """AdamW; weight decay on the matrices, the tied embedding among them."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": hyper.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=hyper.lr, betas=(0.9, 0.95), fused=True)


class Run:
    """A training run and its saved state."""

    def __init__(self, hyper: Hyper, state: Path, device: str):
        self.hyper, self.state, self.device, self.progress = hyper, state, device, Spent()
        torch.manual_seed(hyper.seed)
        texts = list(corpus.texts("training"))
        self.tokenizer = train_tokenizer(texts)
        self.stream = token_stream(self.tokenizer, texts)
        self.evaluation = token_stream(self.tokenizer, corpus.texts("evaluation"))
        self.model: Any = self.new_model()
        self.model.to(device)
        self.optimizer = build_optimizer(self.model, hyper)

    def new_model(self) -> PreTrainedModel:
        """What is trained, before it is."""
        return new_model(self.tokenizer)

    def loss(self, ids: Tensor) -> Tensor:
        """What is made small on ids (batch, WINDOW)."""
        return next_token_loss(self.model, ids)

    def train(self, every: int = 100) -> None:
        """Step until nothing is left of the run; save and measure `every` so many steps."""
        coming = batches(self.stream, self.hyper, self.progress.step)
        while self.hyper.left(self.progress) > 0:
            started = time.perf_counter()
            ids = next(coming).to(self.device)
            loss = self._step(ids)
            seconds = time.perf_counter() - started
            done = self.progress
            done.step, done.tokens, done.seconds = done.step + 1, done.tokens + ids.numel(), done.seconds + seconds
            if done.step % every == 0 or self.hyper.left(done) <= 0:
                self.save()
                held_out = held_out_loss(self.model, self.evaluation[: 16 * WINDOW].to(self.device))
                pace = f"{ids.numel() / seconds:.0f} tokens/s, {done.seconds:.0f} s"
                print(f"step {done.step} loss {loss:.4f} held-out {held_out:.4f} ({pace})", flush=True)

    def _step(self, ids: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.hyper.lr_now(self.progress)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            loss = self.loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.hyper.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        saved = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        torch.save(saved, self.state / "state.partial")
        os.replace(self.state / "state.partial", self.state / "state.pt")

    def resume(self) -> None:
        saved = torch.load(self.state / "state.pt", weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.progress = Spent(**saved["progress"])

    def export(self, out: Path) -> None:
        """Write the folder that ships: bf16 weights, tokenizer, configs and a README with measured figures."""
        self.tokenizer.save_pretrained(out)
        state = {name: value.bfloat16() for name, value in self.model.state_dict().items()}
        half: Any = LlamaForCausalLM(self.model.config).bfloat16()
        half.load_state_dict(state)
        half.generation_config = GenerationConfig(
            do_sample=False,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        half.save_pretrained(out)
        (out / "model.safetensors").chmod(0o644)  # safetensors writes 0600, which a wheel would carry along
        shipped = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        perplexity = math.exp(held_out_loss(shipped, self.evaluation))
        readme = self._readme(perplexity, continuation(shipped, self.tokenizer, "def "))
        (out / "README.md").write_text(readme, encoding="utf-8")

    def _readme(self, perplexity: float, written: str) -> str:
        spent = self.progress
        parameters = sum(p.numel() for p in self.model.parameters())
        hyper = {key: value for key, value in asdict(self.hyper).items() if key not in ("steps", "minutes")}
        return README.format(
            millions=parameters / 1e6,
            python=platform.python_version(),
            vocab=VOCAB,
            tokens=spent.tokens,
            epochs=spent.tokens / len(self.stream),
            stream=len(self.stream),
            steps=spent.step,
            seconds=spent.seconds,
            device=f"{torch.get_num_threads()} CPU threads" if self.device == "cpu" else self.device,
            hyper=json.dumps(hyper)[1:-1].replace('"', ""),
            evaluation=corpus.describe("evaluation"),
            held_out=len(self.evaluation),
            perplexity=perplexity,
            window=WINDOW,
            written=written,
        )


README = """\
# The demo model

A Llama of {millions:.1f} M parameters that writes Python-like text, small enough to ship inside `llmsparse`. It
exists to be pruned: it is good for trying methods in seconds, and no good for writing code.

- Text: the standard library of Python {python} without its tests, tables and held-out modules
  (`llmsparse/demo/corpus.py`), {stream:,} tokens of a byte-level BPE with {vocab} entries.
- Training: {tokens:,} tokens ({epochs:.2f} epochs) in {steps} steps, {seconds:,.0f} s on {device}; AdamW,
  fp32 weights with bf16 products, rate falling linearly to 0.
  {hyper}
- Weights: bf16.
- Perplexity: {perplexity:.2f} on {held_out:,} tokens never trained on, windows of {window}
  ({evaluation}).

Greedy continuation of `def `:

```python
{written}
```

Rebuild it with `python -m llmsparse.demo.train --out llmsparse/demo/model`.
"""


def continuation(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int = 60) -> str:
    """The prompt and what the model greedily writes after it."""
    written = model.generate(torch.tensor([tokenizer.encode(prompt)]), max_new_tokens=tokens)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded demo model on Python's standard library.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=3000, help="steps of 4096 tokens")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, if that comes first")
    parser.add_argument("--state", type=Path, default=Path("/tmp/demo_train"), help="folder for resumable state")
    parser.add_argument("--resume", action="store_true", help="continue from the saved state")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    run = Run(Hyper(steps=args.steps, minutes=args.minutes), args.state, args.device)
    if args.resume:
        run.resume()
    run.train()
    run.export(args.out)


if __name__ == "__main__":
    main()
