"""Stages `library` and `prune`: what a user does, by the public names alone."""

from __future__ import annotations

import cProfile
import pstats
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.gpu_session.record import DEVICE, DRY, attempt, say

PLACE = DEVICE.type
SMALL = (64, 128, 4, 2, 2, 256, 16, 64) if DRY else (1024, 2816, 16, 2, 4, 256, 16, 64)
EIGHT_B = (64, 128, 4, 2, 2, 256, 16, 64) if DRY else (4096, 14336, 32, 8, 2, 1024, 128, 2048)  # two of its blocks
LOADED = [("2:4", None, ("mma24", "select24", "cusparselt")), ("unstructured", 0.7, ("split24", "bitmask", "sell"))]
PRUNED = [  # method, pattern, steps of matching; the first run also pays for what is loaded and compiled once
    ("wanda", "unstructured", 0), ("wanda", "unstructured", 0), ("wanda", "2:4", 0), ("sparsegpt", "unstructured", 0),
    ("sparsegpt", "2:4", 0), ("wanda", "unstructured", 30), ("dsnot", "unstructured", 0), ("alps", "unstructured", 0),
]  # fmt: skip


def checkpoint(
    folder: Path,
    hidden: int,
    ffn: int,
    heads: int,
    groups: int,
    layers: int,
    vocabulary: int,
    windows: int,
    length: int,
) -> dict[str, str]:
    """A random Llama and as random tokens, on disk: the keys that a run takes."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=4096,
                         tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)  # fmt: skip
    torch.manual_seed(0)
    with DEVICE:  # drawn there: a CPU takes a minute
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "model")
    ids = torch.randint(2, vocabulary, (windows, length), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, folder / "tokens.safetensors")
    return {"model": str(folder / "model"), "calibration": str(folder / "tokens.safetensors"), "device": PLACE}


def library() -> None:
    """Prune, pack, load by each backend, and compare the logits with dense ones."""
    import llmsparse

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        keys = checkpoint(folder, *SMALL)
        for pattern, sparsity, backends in LOADED:
            pruned, packed = (folder / f"{kind}-{pattern.replace(':', '')}" for kind in ("pruned", "packed"))
            with attempt("library", pattern=pattern):
                some: dict[str, Any] = {"sparsity": sparsity} if sparsity else {}
                report = llmsparse.prune(
                    output=str(pruned), method="wanda", pattern=pattern, match_steps=4, **some, **keys
                )
                llmsparse.pack(str(pruned), str(packed))
                say("library", pattern=pattern, seconds=report.seconds, peak_gb=report.peak_memory_bytes / 1e9)
                load_by_each(packed, pattern, backends)


def load_by_each(packed: Path, pattern: str, backends: tuple[str, ...]) -> None:
    wanted = None
    for backend in ("dense", "dense-lowmem", *backends, "auto"):
        on_gpu_only = DRY and backend in backends
        with attempt("library", pattern=pattern, backend=backend, expected=on_gpu_only):
            *logits, made = outputs(packed, backend)
            wanted = wanted or logits
            far = [float((got - want).norm() / want.norm()) for got, want in zip(logits, wanted, strict=True)]
            say("library", pattern=pattern, backend=backend, far_32_tokens=far[0], far_1_token=far[1], made=made,
                ok=max(far) < 0.05)  # fmt: skip


def outputs(packed: Path, backend: str) -> tuple[Tensor, Tensor, list[int]]:
    """Logits of 32 tokens and of one, and eight tokens that follow."""
    from transformers import AutoModelForCausalLM

    import llmsparse

    config = llmsparse.SparseConfig(backend=backend)
    model = AutoModelForCausalLM.from_pretrained(
        packed, quantization_config=config, device_map=PLACE, dtype=torch.bfloat16
    )
    ids = torch.arange(2, 34, device=DEVICE)[None]
    with torch.inference_mode():
        made = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, -8:].tolist()
        return model(ids).logits.float(), model(ids[:, :1]).logits.float(), made


def prune() -> None:
    """Two blocks of a Llama-3-8B on 128 × 2048 tokens, by each method: seconds a block, peak memory, and of Wanda, which
    the host holds up, the functions where they go."""
    import llmsparse

    with tempfile.TemporaryDirectory() as scratch:
        folder, begun = Path(scratch), time.monotonic()
        keys = checkpoint(folder, *EIGHT_B)
        say("prune", built_s=round(time.monotonic() - begun, 1))
        for number, (method, pattern, steps) in enumerate(PRUNED[:3] if DRY else PRUNED):
            profile = cProfile.Profile()
            some: dict[str, Any] = {"sparsity": 0.5} if pattern == "unstructured" else {}
            output = str(folder / f"out{number}")
            try:
                if number == 1:
                    profile.enable()
                report = llmsparse.prune(
                    output=output, method=method, pattern=pattern, match_steps=steps, **some, **keys
                )
                profile.disable()
            except Exception as error:
                say("prune", method=method, pattern=pattern, failed=f"{type(error).__name__}: {error}"[:300],
                    trace=traceback.format_exc()[-1500:])  # fmt: skip
                if "CUDA error" in str(error):
                    raise
                continue
            say("prune", method=method, pattern=pattern, match_steps=steps, seconds=round(report.seconds, 2),
                blocks_s=[round(block.seconds[block.name], 2) for block in report.blocks],
                peak_gb=round(report.peak_memory_bytes / 1e9, 2), spent=where(profile) if number == 1 else None)  # fmt: skip


def where(profile: cProfile.Profile, most: int = 14) -> dict[str, float]:
    """llmsparse's own functions by the seconds in them and in what they call."""
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = pstats.Stats(profile).stats  # pyright: ignore
    own = {f"{Path(file).stem}.{name}": row[3] for (file, _, name), row in stats.items() if "llmsparse" in file}
    return {name: round(own[name], 2) for name in sorted(own, key=own.__getitem__, reverse=True)[:most]}
