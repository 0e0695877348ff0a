"""A packed folder is checked before it is trusted: damage of any kind is one line that names where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse import save_sparse

import llmsparse
from llmsparse.cli.app import main
from llmsparse.packing.folder import RECORD, PackedCheckpoint

Spoil = Callable[[Path], None]
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed: one weight 2:4, the others unstructured."""
    folder = tmp_path_factory.mktemp("packed")
    dense = save_sparse("llama", folder / "dense", pattern="2:4", shard="1GB")
    tensors = load_file(dense / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "o_proj" not in name:
            tensor[:, :3], tensor[0, :4] = 0, torch.tensor([1.0, 1, 1, 0])
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    llmsparse.pack(str(dense), folder / "packed")
    return folder / "packed"


@pytest.fixture
def packed(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(pristine, tmp_path / "packed"))


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The error of a command: code 2 or 3, one line, nothing on stdout, nothing new in the current folder."""

    def run(*arguments: str) -> str:
        before = sorted(path.name for path in Path().iterdir())
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        assert code in (2, 3) and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        assert sorted(path.name for path in Path().iterdir()) == before
        return err

    return run


def config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"] |= changes
    file.write_text(json.dumps(content))


def layer(folder: Path, **changes: Any) -> None:
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    layers[NAME] |= changes
    config(folder, layers=layers)


def flip(folder: Path, key: str) -> None:
    spec = PackedCheckpoint(folder).reader.spec(key)
    with spec.file.open("r+b") as stream:
        stream.seek((spec.begin + spec.end) // 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop(folder: Path, key: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


SPOILT: dict[str, tuple[Spoil, str]] = {
    "truncated": (truncate, "model.safetensors: truncated"),
    "a bit of the mask": (lambda p: flip(p, NAME + "_mask"), f"{NAME}: mask and offsets disagree"),
    "a bit of the offsets": (lambda p: flip(p, NAME + "_offsets"), f"{NAME}: mask and offsets disagree"),
    "a bit of a 2:4 mask": (
        lambda p: flip(p, "model.layers.0.self_attn.o_proj.weight_mask"),
        "model.layers.0.self_attn.o_proj.weight: mask has a group that does not keep 2:4",
    ),
    "a later version": (lambda p: config(p, format_version=3), "format version 3, this llmsparse reads up to 2"),
    "a version that is none": (lambda p: config(p, format_version="new"), "format_version 'new', wanted 1"),
    "another format": (lambda p: config(p, format="csr"), "format 'csr', wanted 'bitmask'"),
    "another bit order": (lambda p: config(p, bit_order="big"), "bit_order 'big', wanted 'little'"),
    "no layers": (lambda p: config(p, layers=None), "no layers"),
    "another shape": (lambda p: layer(p, shape=[48, 40]), f"{NAME}_mask is [48, 4]"),
    "another count": (lambda p: layer(p, nnz=7), f"{NAME} is ["),
    "a shape that is none": (lambda p: layer(p, shape=None), "wanted two or more sizes"),
    "no mask": (lambda p: drop(p, NAME + "_mask"), f"holds no tensor '{NAME}_mask'"),
    "a record that is none": (lambda p: (p / RECORD).write_text('{"versions": 3}') and None, RECORD),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_packed_checkpoint_is_refused(case: str, packed: Path, fails: Callable[..., str]) -> None:
    spoil, wanted = SPOILT[case]
    spoil(packed)
    assert wanted in fails("unpack", "packed", "-o", "out")
    assert wanted in fails("inspect", "packed", "--verify")


@pytest.mark.parametrize("key", [NAME, "model.norm.weight"])
def test_a_bit_of_a_value_is_found_by_its_checksum(key: str, packed: Path, fails: Callable[..., str]) -> None:
    assert main(["inspect", "packed", "--verify"]) == 0
    flip(packed, key)
    wanted = "model.safetensors: is not what was written: its sha256"
    assert wanted in fails("inspect", "packed", "--verify")
    assert wanted in fails("unpack", "packed", "-o", "out") and not Path("out").exists()


def test_verify_needs_checksums(packed: Path, fails: Callable[..., str]) -> None:
    (packed / RECORD).unlink()
    assert f"has no {RECORD}" in fails("inspect", "packed", "--verify")
    assert main(["unpack", "packed", "-o", "dense"]) == 0
    assert "not packed, so it holds no checksums" in fails("inspect", "dense", "--verify")


def test_outputs_that_cannot_be(packed: Path, fails: Callable[..., str]) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    assert "exists already" in fails("unpack", "packed", "-o", "mine")
    assert "not a checkpoint" in fails("unpack", "packed", "-o", "mine", "--overwrite")
    assert "must lie apart" in fails("unpack", "packed", "-o", "packed/dense")
    assert "--max-shard-size: got 'much', wanted a positive number of bytes" in fails(
        "unpack", "packed", "-o", "out", "--max-shard-size", "much"
    )
    assert main(["unpack", "packed", "-o", "dense"]) == 0
    for output, complaint in (("mine", "exists already"), ("dense/packed", "must lie apart"), (".", "must lie apart")):
        assert complaint in fails("pack", "dense", "-o", output)
    assert main(["pack", "dense", "-o", "packed", "--overwrite"]) == 0
    Path("out.partial").mkdir()
    Path("out.partial/notes.txt").write_text("mine")
    assert "in the way" in fails("pack", "dense", "-o", "out")


def test_an_interrupted_run_leaves_nothing_and_the_old_output(
    packed: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    assert main(["unpack", "packed", "-o", "dense"]) == 0
    before = (packed / RECORD).read_bytes()
    monkeypatch.setattr("llmsparse.packing.pack.sha256", interrupt)
    for arguments in (["-o", "out"], ["-o", "packed", "--overwrite"]):
        assert main(["pack", "dense", *arguments]) == 130
    assert sorted(path.name for path in Path().iterdir()) == ["dense", "packed"]
    assert (packed / RECORD).read_bytes() == before


def test_inspect_shows_packed_and_dense_bytes(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unpack", "packed", "-o", "dense"]) == 0
    found, dense = llmsparse.inspect("packed", verify=True), llmsparse.inspect("dense")
    assert found.verified and not dense.verified
    assert (found.parameters, found.zeros, found.dense_bytes) == (dense.parameters, dense.zeros, dense.bytes)
    assert found.embedding_zeros == dense.embedding_zeros
    was = {weight.name: weight for weight in dense.weights}
    for weight in found.weights:
        assert (weight.shape, weight.sparsity, weight.pattern) == (
            was[weight.name].shape,
            was[weight.name].sparsity,
            was[weight.name].pattern,
        )
        assert (weight.dense_bytes, weight.packed) == (was[weight.name].bytes, weight.name != "model.embed_tokens")
    capsys.readouterr()
    assert main(["inspect", "packed", "--verify"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    packed_bytes, dense_bytes = (sum(getattr(w, key) for w in found.packed) for key in ("bytes", "dense_bytes"))
    assert f"packed: 15 weights, {packed_bytes / 1e6:.2f} MB, dense {dense_bytes / 1e6:.2f} MB, ratio" in shown
    assert "ratio" in shown and "⌈n/8⌉" in shown and "verified" in shown
    assert main(["inspect", "packed", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["packed_bytes"], told["packed_dense_bytes"], told["verified"]) == (packed_bytes, dense_bytes, False)


def test_pack_and_unpack_say_what_they_did(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unpack", "packed", "-o", "dense", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == 15
    assert main(["pack", "dense", "-o", "again", "--json", "--max-shard-size", "20KB"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] < told["dense_bytes"] and len(told["weights"]) == 15 and told["left_dense"] == []
    assert len(list(Path("again").glob("*.safetensors"))) > 1
    assert main(["unpack", "again", "-o", "dense", "--overwrite"]) == 0
    assert "15 weights, from llmsparse bitmask" in capsys.readouterr().out
