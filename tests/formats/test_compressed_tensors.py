"""Checkpoints in the two sparse formats of compressed-tensors, built from their layout by hand, open again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse import assert_same_tensors, one_line, save_sparse
from torch import Tensor

import llmsparse
from llmsparse.errors import CheckpointError
from llmsparse.formats import compressed_tensors
from llmsparse.storage.checkpoint import CheckpointReader

Compress = Callable[[str, Tensor], dict[str, Tensor]]


def places(weight: Tensor) -> Any:
    return (weight.view(torch.int16) != 0).numpy()


def sparse_bitmask(name: str, weight: Tensor) -> dict[str, Tensor]:
    """`X.weight.shape`, `.compressed`, `.bitmask`, `.row_offsets`."""
    kept = places(weight)
    counts = kept.sum(axis=1)
    return {
        f"{name}.shape": torch.tensor(weight.shape),
        f"{name}.compressed": weight[torch.from_numpy(kept)],
        f"{name}.bitmask": torch.from_numpy(np.packbits(kept, axis=1, bitorder="little")),
        f"{name}.row_offsets": torch.from_numpy(np.cumsum(counts) - counts),
    }


def sparse_24_bitmask(name: str, weight: Tensor) -> dict[str, Tensor]:
    """`X.shape` (2, 1), `X.compressed`, `X.bitmask`: the two largest of four, whether they are zero or not."""
    name = name.removesuffix(".weight")
    order = np.argsort(-weight.float().abs().numpy().reshape(-1, 4), axis=1, kind="stable")
    kept = np.zeros((weight.numel() // 4, 4), bool)
    np.put_along_axis(kept, order[:, :2], True, axis=1)
    kept = kept.reshape(weight.shape)
    return {
        f"{name}.shape": torch.tensor(weight.shape)[:, None],
        f"{name}.compressed": weight[torch.from_numpy(kept)].view(weight.shape[0], -1),
        f"{name}.bitmask": torch.from_numpy(np.packbits(kept, axis=1, bitorder="little")),
    }


FORMATS: dict[str, tuple[Compress, str]] = {
    "sparse-bitmask": (sparse_bitmask, "unstructured"),
    "sparse-24-bitmask": (sparse_24_bitmask, "2:4"),
}


def block(name: str, form: str) -> dict[str, Any]:
    """The places where versions of compressed-tensors wrote it."""
    sparsity = {"format": form, "global_sparsity": 0.5, "sparsity_structure": "2:4", "targets": ["Linear"]}
    if name == "sparsity_config":
        return {name: sparsity}
    return {name: {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity}}


def compress(dense: Path, folder: Path, form: str, where: str = "quantization_config") -> Path:
    function, _ = FORMATS[form]
    tensors: dict[str, Tensor] = {}
    reader = CheckpointReader(dense)
    for key, tensor in reader.read(reader.keys()).items():
        tensors |= function(key, tensor) if key.endswith("_proj.weight") else {key: tensor}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | block(where, form)))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dense(form: str, tmp_path: Path) -> Path:
    return save_sparse("llama", tmp_path / "dense", pattern=FORMATS[form][1], intermediate_size=44)


@pytest.mark.parametrize("where", compressed_tensors.BLOCKS)
def test_unpack_writes_the_dense_checkpoint(form: str, where: str, dense: Path, tmp_path: Path) -> None:
    result = llmsparse.unpack(str(compress(dense, tmp_path / "old", form, where)), tmp_path / "new")
    assert_same_tensors(dense, tmp_path / "new")
    assert json.loads((tmp_path / "new/config.json").read_text()) == json.loads((dense / "config.json").read_text())
    assert (tmp_path / "new/tokenizer.json").read_text() == "{}"
    assert (result.weights, result.format) == (14, f"compressed-tensors {form}")
    assert result.bytes < result.dense_bytes


def test_prune_names_the_way_back(form: str, dense: Path, tmp_path: Path) -> None:
    old = compress(dense, tmp_path / "old", form)
    with pytest.raises(CheckpointError, match=f"compressed by compressed-tensors .{form}.; .*llmsparse unpack"):
        llmsparse.plan(model=str(old), sparsity=0.5)


def test_weights_that_are_quantized_too_are_refused(form: str, dense: Path, tmp_path: Path) -> None:
    old = compress(dense, tmp_path / "old", form)
    config = json.loads((old / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {"group_0": {"weights": {"num_bits": 8}}}
    (old / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantizes the sparse weights too"):
        llmsparse.unpack(str(old), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("part", ["shape", "compressed", "bitmask"])
def test_damage_is_found_and_nothing_is_left_behind(part: str, form: str, dense: Path, tmp_path: Path) -> None:
    old = compress(dense, tmp_path / "old", form)
    tensors = load_file(old / "model.safetensors")
    name = next(name for name in tensors if "up_proj" in name and name.endswith(part))
    if part == "shape":
        tensors[name] = tensors[name] * 2
    elif part == "compressed":
        tensors[name] = tensors[name].flatten()[:-1].clone()
    else:
        tensors[name].view(-1)[3] ^= 1
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: .*damaged") as error:
        llmsparse.unpack(str(old), tmp_path / "new")
    one_line(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "old"]
