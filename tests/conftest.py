"""Tiny checkpoints on disk, built once a session, and a network that is never asked."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import argparse
import json
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# Triton reads it once, when something first imports it: without a GPU its kernels are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

settings.register_profile("llmsparse", deadline=None, max_examples=50)
settings.load_profile("llmsparse")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def text() -> str:
    """About 150 kB of Python from the standard library: different on every Python version."""
    return "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, textwrap, shutil))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A byte-level BPE of 384 tokens, with `<s>` = 0 and `</s>` = 1, as save_pretrained writes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text[:20_000]], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=128
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tokenizer_folder: Path) -> Callable[..., Path]:
    """`tiny_llama(folder, *, shards=1, dtype=torch.float32, layers=2, hidden=32, ffn=64, vocab=384, tie=True, seed=0)`.

    Writes a random Llama with its tokenizer as save_pretrained does, in exactly `shards` files, and returns the folder.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(
        folder: Path,
        *,
        shards: int = 1,
        dtype: torch.dtype = torch.float32,
        layers: int = 2,
        hidden: int = 32,
        ffn: int = 64,
        vocab: int = 384,
        tie: bool = True,
        seed: int = 0,
    ) -> Path:
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
            max_position_embeddings=128,
            tie_word_embeddings=tie,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.1,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config).to(dtype)
        model.save_pretrained(folder)
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
        if shards > 1:
            split_shards(folder, shards)
        return folder

    return build


def split_shards(folder: Path, shards: int) -> None:
    """Turn a folder's `model.safetensors` into exactly `shards` files and their index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    keys, weight_map = list(tensors), dict[str, str]()
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = keys[number * len(keys) // shards : (number + 1) * len(keys) // shards]
        save_file({key: tensors[key] for key in part}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "model.safetensors").unlink()


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that may be neither read nor written, also where the tests run as root: its privileges are laid down."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o700)
