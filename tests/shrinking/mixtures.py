"""A small mixture with a tokenizer, and two texts that differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.architectures import random_model, tiny_config


def save_mixture(folder: Path, tokenizer: Path, name: str = "qwen3_moe", **changes: Any) -> Path:
    """A random mixture of 8 experts in 3 layers, two of which run for a token, in several shards."""
    sizes: dict[str, Any] = {
        "vocab_size": 384,
        "num_hidden_layers": 3,
        "num_experts": 8,
        "max_position_embeddings": 128,
    }
    model = random_model(tiny_config(name, **sizes | {"bos_token_id": 0, "eos_token_id": 1} | changes))
    model.save_pretrained(folder, max_shard_size="64KB")
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def save_texts(folder: Path, text: str) -> tuple[Path, Path]:
    """`prose.txt` and `numbers.jsonl`."""
    prose, numbers = folder / "prose.txt", folder / "numbers.jsonl"
    prose.write_text(text[:40_000], encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    rows = [" ".join(map(str, torch.randint(0, 10**6, (60,), generator=generator).tolist())) for _ in range(60)]
    numbers.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return prose, numbers


def files(folder: Path) -> dict[str, bytes]:
    """What the promise of identical bytes covers: every file, the report without its timings."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    report = json.loads(found.pop("llmsparse_report.json"))
    report.pop("timings")
    return {**found, "report": json.dumps(report).encode()}
