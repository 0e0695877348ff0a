"""Train the model that ships with `llmsparse`: a 7 M parameter Llama that writes Python.

    python -m llmsparse.demo.train --out llmsparse/demo/model

Its text is the standard library (`demo/corpus.py`), so the whole artefact can be rebuilt from this file and a Python
install, on two CPU cores in about an hour. Everything runs in fp32, since bf16 products are emulated on most CPUs;
weights are rounded to bf16 once, when exported. Block matrices are trained by Muon, which gets further than AdamW on
so few tokens; `torch.optim.Muon` iterates in bf16, hence the one below.

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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmsparse.demo import corpus

BOS, EOS = "<|bos|>", "<|eos|>"
VOCAB = 4096
WINDOW = 512


@dataclass
class Progress:
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
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: int = 20  # steps
    decay: float = 0.35  # fraction of the run over which the learning rate falls to 0
    clip: float = 1.0
    seed: int = 0

    def left(self, done: Progress) -> float:
        """The fraction of the run still ahead, at most 0 at its end."""
        return 1 - max(done.step / self.steps, done.seconds / (60 * self.minutes))

    def lr_scale(self, done: Progress) -> float:
        """Warm up, stay, decay linearly to 0 (a WSD schedule)."""
        return min((done.step + 1) / self.warmup, 1.0, self.left(done) / self.decay)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest semi-orthogonal matrix (Jordan et al. 2024), in fp32."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for (rows, cols), params in by_shape.items():
                update = orthogonalize(torch.stack([self._nesterov(p, group["momentum"]) for p in params]))
                for p, u in zip(params, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u, alpha=-group["lr"] * math.sqrt(max(1.0, rows / cols)))

    def _nesterov(self, p: Tensor, momentum: float) -> Tensor:
        assert p.grad is not None
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
        return p.grad.lerp(buffer.lerp_(p.grad, 1 - momentum), momentum)


def orthogonalize(g: Tensor) -> Tensor:
    """The U Vᵀ of each g = U S Vᵀ, roughly: five Newton-Schulz steps on a stack of matrices (n, rows, cols)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al.: steepest at 0 while singular values stay within about [0.7, 1.2]
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = g.shape[1] > g.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT  # (n, short, short)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text survives a round trip, a newline and its indentation are one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=1_000_000,  # texts are tokenized whole and cut into windows later
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama whose every linear has widths divisible by 128, so that all patterns and tile sizes fit."""
    ids = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(p)  # each block starts as the identity
    return model


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
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


def build_optimizers(model: LlamaForCausalLM, hyper: Hyper) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the (tied) embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = set(matrices)
    rest = [p for p in model.parameters() if p not in chosen]
    return [
        Muon(matrices, lr=hyper.muon_lr, weight_decay=hyper.weight_decay),
        torch.optim.AdamW(rest, lr=hyper.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Run:
    """A training run and its saved state."""

    def __init__(self, hyper: Hyper, state: Path):
        self.hyper, self.state, self.progress = hyper, state, Progress()
        torch.manual_seed(hyper.seed)
        texts = corpus.training_texts()
        self.tokenizer = train_tokenizer(texts)
        self.stream = token_stream(self.tokenizer, texts)
        self.evaluation = token_stream(self.tokenizer, corpus.texts("evaluation"))
        self.model = new_model(self.tokenizer)
        self.optimizers = build_optimizers(self.model, hyper)

    def train(self, every: int = 25) -> None:
        """Step until nothing is left of the run; save and measure `every` so many steps."""
        step_model = torch.compile(self.model)
        coming = batches(self.stream, self.hyper, self.progress.step)
        while self.hyper.left(self.progress) > 0:
            started = time.perf_counter()
            ids = next(coming)
            loss = self._step(step_model, ids)
            seconds = time.perf_counter() - started
            done = self.progress
            done.step, done.tokens, done.seconds = done.step + 1, done.tokens + ids.numel(), done.seconds + seconds
            print(f"step {done.step} loss {loss:.4f} tokens/s {ids.numel() / seconds:.0f}", flush=True)
            if done.step % every == 0 or self.hyper.left(done) <= 0:
                self.save()
                held_out = held_out_loss(self.model, self.evaluation[: 16 * WINDOW])
                print(f"step {done.step} held-out loss {held_out:.4f} after {done.seconds:.0f} s", flush=True)

    def _step(self, step_model: Callable[..., Any], ids: Tensor) -> float:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * self.hyper.lr_scale(self.progress)
        loss = next_token_loss(step_model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.hyper.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def save(self) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        saved = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
        }
        torch.save(saved, self.state / "state.partial")
        os.replace(self.state / "state.partial", self.state / "state.pt")

    def resume(self) -> None:
        saved = torch.load(self.state / "state.pt", weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress = Progress(**saved["progress"])

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
- Training: {tokens:,} tokens ({epochs:.2f} epochs) in {steps} steps, {seconds:,.0f} s on 2 CPU cores, fp32; Muon for
  the block matrices, AdamW for the embedding and norms, constant rate with linear decay.
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
    parser.add_argument("--steps", type=int, default=900, help="steps of 4096 tokens")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, if that comes first")
    parser.add_argument("--state", type=Path, default=Path("/tmp/demo_train"), help="folder for resumable state")
    parser.add_argument("--resume", action="store_true", help="continue from the saved state")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    run = Run(Hyper(steps=args.steps, minutes=args.minutes), args.state)
    if args.resume:
        run.resume()
    run.train()
    run.export(args.out)


if __name__ == "__main__":
    main()
