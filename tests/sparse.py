"""Tiny checkpoints of any family with zeros in all of their matrices, and how to compare two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from architectures import random_model, tiny_config
from torch import Tensor
from transformers import PreTrainedModel

from llmsparse.errors import LlmsparseError
from llmsparse.sparsity.patterns import NofM
from llmsparse.storage.checkpoint import CheckpointReader


@torch.no_grad()
def sparsify(model: PreTrainedModel, pattern: str = "unstructured", sparsity: float = 0.7) -> PreTrainedModel:
    """Zeros in every parameter of two or more dimensions, along its last one if it is N:M."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            continue
        score = torch.rand(parameter.shape, generator=generator)
        if pattern == "unstructured":
            parameter.masked_fill_(score < sparsity, 0.0)
        else:
            n, m = map(int, pattern.split(":"))
            rows = score.reshape(-1, score.shape[-1])
            keep = NofM(n, m).keep(rows, slice(0, rows.shape[1]), rows.shape[1])
            parameter.masked_fill_(~keep.view(score.shape), 0.0)
    return model


def save_sparse(
    family: str,
    folder: Path,
    *,
    pattern: str = "unstructured",
    sparsity: float = 0.7,
    dtype: torch.dtype = torch.bfloat16,
    shard: str = "24KB",
    **changes: Any,
) -> Path:
    """A checkpoint of a family's tiny config, sparse, in several shards; returns the folder."""
    model = sparsify(random_model(tiny_config(family, **changes)), pattern, sparsity)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def assert_same_tensors(folder: Path, other: Path) -> None:
    """Names, shapes, dtypes and every bit."""
    a, b = CheckpointReader(folder), CheckpointReader(other)
    assert set(a.keys()) == set(b.keys())
    for key in a.keys():
        one, two = a.read([key])[key], b.read([key])[key]
        assert (one.shape, one.dtype) == (two.shape, two.dtype), key
        assert torch.equal(bits(one), bits(two)), key


def one_line(error: LlmsparseError) -> str:
    assert "\n" not in str(error)
    return str(error)
