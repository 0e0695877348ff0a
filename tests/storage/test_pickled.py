"""Pickled weights are read without running what they hold, and give what safetensors would."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmsparse
from llmsparse.cli.app import main
from llmsparse.encodings.reader import open_checkpoint
from llmsparse.errors import CheckpointError
from llmsparse.storage.pickled import PickledReader


@pytest.fixture
def pickled(tmp_path: Path, tiny_llama: Callable[..., Path]) -> tuple[Path, Path]:
    """A checkpoint in safetensors, and the same in two pickled shards."""
    plain = tiny_llama(tmp_path / "plain")
    folder = tmp_path / "pickled"
    shutil.copytree(plain, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: f"pytorch_model-{number % 2}.bin" for number, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        torch.save({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}  # transformers reads both
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return plain, folder


def test_tensors_are_those_of_safetensors(pickled: tuple[Path, Path]) -> None:
    plain, folder = pickled
    reader, tensors = open_checkpoint(folder), load_file(plain / "model.safetensors")
    assert isinstance(reader, PickledReader) and set(reader.keys()) == tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in reader.read(reader.keys()).items())


def test_pruning_it_gives_the_bytes_that_pruning_safetensors_gives(
    pickled: tuple[Path, Path], tmp_path: Path, text: str
) -> None:
    (tmp_path / "prose.txt").write_text(text[:8000])
    keys: dict[str, Any] = {
        "sparsity": 0.5, "calibration": str(tmp_path / "prose.txt"), "calibration_samples": 4, "seq_len": 32,
        "device": "cpu", "match_steps": 2,
    }  # fmt: skip
    for number, source in enumerate(pickled):
        llmsparse.prune(model=str(source), output=str(tmp_path / f"out{number}"), **keys)
    one, other = (load_file(tmp_path / f"out{number}" / "model.safetensors") for number in range(2))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_inspect_generate_and_pack_read_it_too(
    pickled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pickled[1]
    inspected = [llmsparse.inspect(str(source)).to_json()["weights"] for source in pickled]
    one, other = ({row["name"]: row for row in rows} for rows in inspected)
    assert one == other != {}
    said = [llmsparse.generate(str(source), "a text", max_new_tokens=4, device="cpu").text for source in pickled]
    assert said[0] == said[1]
    for file in folder.glob("*.bin"):
        tensors = torch.load(file, weights_only=True)
        torch.save({key: tensor * (torch.rand(tensor.shape) < 0.3) for key, tensor in tensors.items()}, file)
    capsys.readouterr()
    assert main(["pack", str(folder), "-o", str(tmp_path / "packed"), "-q"]) == 0
    assert main(["unpack", str(tmp_path / "packed"), "-o", str(tmp_path / "back"), "-q"]) == 0
    back, stored = load_file(tmp_path / "back" / "model.safetensors"), open_checkpoint(folder)
    assert set(stored.keys()) == back.keys() != set()
    assert all(torch.equal(tensor, back[key]) for key, tensor in stored.read(stored.keys()).items())
    assert capsys.readouterr().err == ""


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


def test_code_in_it_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as weights alone") as caught:
        PickledReader(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"\x80\x02}q\x00.", "cannot be read"),
        (b"PK\x03\x04 cut off", "cannot be read"),
    ],
)
def test_what_is_no_pickle_of_weights_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        PickledReader(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(4, 4).to_sparse(), "w is a tensor of layout torch.sparse_coo, wanted a dense tensor"),
        (torch.zeros(4, 4, device="meta"), "w is no numbers, wanted a dense tensor"),
    ],
    ids=["sparse", "meta"],
)
def test_a_tensor_that_is_none_of_numbers_in_rows_is_one_line(
    tensor: torch.Tensor, message: str, tmp_path: Path
) -> None:
    torch.save({"w": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_named(pickled: tuple[Path, Path]) -> None:
    (pickled[1] / "pytorch_model-1.bin").unlink()
    with pytest.raises(CheckpointError, match=r"names shard pytorch_model-1\.bin, which is missing"):
        open_checkpoint(pickled[1])
