"""Weights stored by others in 8 bits and less are read as what they stand for, and pruned as their 16-bit twin would be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_random, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import (  # pyright: ignore[reportMissingTypeStubs]
    _dequantize_fp8_weight,  # pyright: ignore[reportPrivateUsage]
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # pyright: ignore[reportMissingTypeStubs]

import llmsparse
from llmsparse.encodings.reader import DecodedReader, open_checkpoint
from llmsparse.errors import CheckpointError, LlmsparseError
from llmsparse.storage.checkpoint import CheckpointReader

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 16, "symmetric": True}}},
}
Encode = Callable[[str, Tensor], dict[str, Tensor]]


def folder_with(path: Path, tensors: dict[str, Tensor], block: dict[str, Any], **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": block, "dtype": "bfloat16"}))
    return path


def blocks_of_16(name: str, weight: Tensor) -> dict[str, Tensor]:
    """As DeepSeek stores it: the largest of each 16 × 16 block becomes 448."""
    out, width = weight.shape
    padded = torch.zeros(-(-out // 16) * 16, -(-width // 16) * 16)
    padded[:out, :width] = weight
    tiles = padded.view(padded.shape[0] // 16, 16, padded.shape[1] // 16, 16)
    scale = tiles.abs().amax((1, 3)).clamp_min(1e-6) / 448.0
    spread = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)[:out, :width]
    return {name: (weight / spread).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def one_scale(name: str, weight: Tensor) -> dict[str, Tensor]:
    """As Mistral stores it, with a scale for the activations, which nothing here needs."""
    scale = weight.abs().max() / 448.0
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": scale, name.replace("weight", "activation_scale"): torch.tensor(1.0)}


def rows_of_integers(name: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127.0
    return {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}


def packs_of_4_bits(name: str, weight: Tensor) -> dict[str, Tensor]:
    """As compressed-tensors stores it: eight values plus 8 in 32 bits, a scale for 16 columns."""
    out, width = weight.shape
    groups = weight.view(out, width // 16, 16)
    scale = groups.abs().amax(2) / 7.0
    q = (groups / scale[..., None]).round().clamp(-8, 7).view(out, width).long() + 8
    packed = sum(q[:, place::8] << (4 * place) for place in range(8))
    assert isinstance(packed, Tensor)
    as_signed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    return {f"{name}_packed": as_signed, f"{name}_scale": scale, f"{name}_shape": torch.tensor([out, width])}


def test_block_scales_are_multiplied_as_transformers_does(tmp_path: Path) -> None:
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    stored = blocks_of_16("a.weight", weight)
    reader = open_checkpoint(folder_with(tmp_path, stored, FP8))
    theirs = _dequantize_fp8_weight(stored["a.weight"], stored["a.weight_scale_inv"], [16, 16], torch.float32)
    assert reader.keys() == ["a.weight"] and reader.spec("a.weight").dtype == torch.bfloat16
    assert torch.equal(reader.read(["a.weight"])["a.weight"], theirs.bfloat16())


def test_a_block_may_be_cut_off_at_the_edge(tmp_path: Path) -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    reader = open_checkpoint(folder_with(tmp_path, blocks_of_16("a.weight", weight), FP8))
    torch.testing.assert_close(reader.read(["a.weight"])["a.weight"].float(), weight, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("scales", [(), (1,), (6,), (6, 1)])
def test_a_scale_is_for_all_or_for_a_row(scales: tuple[int, ...], tmp_path: Path) -> None:
    stored = torch.tensor([[1.0, -2.0, 0.5, 448.0]] * 6).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 1.0 + max(1, torch.Size(scales).numel())).view(scales)
    block = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    folder = folder_with(tmp_path, {"a.weight": stored, "a.weight_scale": scale}, block)
    expected = stored.float() * (scale.view(-1, 1) if scale.numel() > 1 else scale)
    assert torch.equal(open_checkpoint(folder).read(["a.weight"])["a.weight"], expected.bfloat16())


def test_experts_in_one_tensor_have_scales_each(tmp_path: Path) -> None:
    matrices = [blocks_of_16("w", torch.randn(32, 16, generator=torch.Generator().manual_seed(n))) for n in range(3)]
    stacked = {"e.w": torch.stack([m["w"].view(torch.uint8) for m in matrices]).view(torch.float8_e4m3fn)}
    stacked["e.w_scale_inv"] = torch.stack([m["w_scale_inv"] for m in matrices])
    weight = open_checkpoint(folder_with(tmp_path, stacked, FP8)).read(["e.w"])["e.w"]
    for expert, stored in zip(weight, matrices, strict=True):
        theirs = _dequantize_fp8_weight(stored["w"], stored["w_scale_inv"], [16, 16], torch.float32)
        assert torch.equal(expert, theirs.bfloat16())


def test_mxfp4_is_decoded_as_transformers_does(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 134, (3, 8, 2), generator=generator, dtype=torch.uint8)
    stored = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales}
    reader = open_checkpoint(folder_with(tmp_path, stored, {"quant_method": "mxfp4"}))
    assert reader.spec("e.gate_up_proj").shape == (3, 64, 8)
    found = reader.read(["e.gate_up_proj"])["e.gate_up_proj"]
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


def test_mxfp4_by_hand(tmp_path: Path) -> None:
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0] = 0x2F  # low half 1111: −6, high half 0010: 1
    stored = {"e_blocks": blocks, "e_scales": torch.full((1, 1, 1), 128, dtype=torch.uint8)}
    weight = open_checkpoint(folder_with(tmp_path, stored, {"quant_method": "mxfp4"})).read(["e"])["e"]
    assert weight.shape == (1, 32, 1) and weight[0, :3, 0].tolist() == [-12.0, 2.0, 0.0]


def test_packed_integers_by_hand(tmp_path: Path) -> None:
    values = [-8, -1, 0, 7, 1, 2, 3, -8]
    word = sum((value + 8) << (4 * place) for place, value in enumerate(values))
    packed = torch.tensor([[word - 2**32 if word >= 2**31 else word]], dtype=torch.int32)
    stored = {"a.weight_packed": packed, "a.weight_scale": torch.tensor([[0.5, 2.0]])}
    weight = open_checkpoint(folder_with(tmp_path, stored, PACKED)).read(["a.weight"])["a.weight"]
    assert weight.tolist() == [[-4.0, -0.5, 0.0, 3.5, 2.0, 4.0, 6.0, -16.0]]


def test_zero_points_and_groups_out_of_order_are_followed(tmp_path: Path) -> None:
    packed = torch.full((2, 1), int("0x11111111", 16), dtype=torch.int32)  # every value −7
    zero = torch.tensor([[0x0000_0012]], dtype=torch.int32)  # of row 0: −6, of row 1: −7
    stored = {
        "a.weight_packed": packed,
        "a.weight_scale": torch.tensor([[1.0, 10.0], [2.0, 20.0]]),
        "a.weight_zero_point": zero.repeat(1, 2),
        "a.weight_g_idx": torch.tensor([1, 0] * 4, dtype=torch.int32),
    }
    weight = open_checkpoint(folder_with(tmp_path, stored, PACKED)).read(["a.weight"])["a.weight"]
    assert weight.tolist() == [[-10.0, -1.0] * 4, [0.0, 0.0] * 4]


@pytest.mark.parametrize(
    ("encode", "block"),
    [
        (blocks_of_16, FP8),
        (one_scale, FP8 | {"weight_block_size": None}),
        (rows_of_integers, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
        (packs_of_4_bits, PACKED),
    ],
)
def test_pruning_an_encoded_model_is_pruning_what_it_stands_for(
    encode: Encode, block: dict[str, Any], tmp_path: Path, tiny_llama: Callable[..., Path], text: str
) -> None:
    dense = tiny_llama(tmp_path / "dense", dtype=torch.bfloat16, hidden=32, ffn=64)
    config = json.loads((dense / "config.json").read_text())
    tensors = load_file(dense / "model.safetensors")
    encoded: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        encoded |= encode(key, tensor.float()) if "_proj" in key else {key: tensor}
    source = folder_with(tmp_path / "encoded", encoded, block, **config)
    for file in dense.glob("tokenizer*"):
        shutil.copy(file, source)
    reader = open_checkpoint(source)
    assert isinstance(reader, DecodedReader)
    twin = tmp_path / "twin"
    shutil.copytree(dense, twin)
    save_file(reader.read(reader.keys()), twin / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "prose.txt").write_text(text[:8000])
    keys: dict[str, Any] = {
        "sparsity": 0.5, "method": "wanda", "calibration": str(tmp_path / "prose.txt"), "calibration_samples": 4,
        "seq_len": 32, "device": "cpu", "match_steps": 0, "exclude": ("*layers.1.mlp*",),
    }  # fmt: skip
    for name, model in (("of-encoded", source), ("of-twin", twin)):
        llmsparse.prune(model=str(model), output=str(tmp_path / name), **keys)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("of-encoded", "of-twin"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert "quantization_config" not in json.loads((tmp_path / "of-encoded" / "config.json").read_text())


def test_experts_of_gpt_oss_are_pruned_from_mxfp4(tmp_path: Path, tokenizer_folder: Path, text: str) -> None:
    config = tiny_config("gpt_oss", hidden_size=64, intermediate_size=64, vocab_size=384)
    dense = save_random(config, tmp_path / "dense", shard="1GB")
    tensors = load_file(dense / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, out = tensors.pop(key).shape
        shape = (experts, out, width // 32, 16)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.full(shape[:-1], 122, dtype=torch.uint8)
    source = folder_with(
        tmp_path / "source", tensors, {"quant_method": "mxfp4"}, **json.loads((dense / "config.json").read_text())
    )
    shutil.copytree(tokenizer_folder, source, dirs_exist_ok=True)
    (tmp_path / "prose.txt").write_text(text[:8000])
    report = llmsparse.prune(
        model=str(source), output=str(tmp_path / "out"), sparsity=0.5, method="magnitude", device="cpu", match_steps=0,
        calibration=str(tmp_path / "prose.txt"), calibration_samples=2, seq_len=32,
    )  # fmt: skip
    written = CheckpointReader(tmp_path / "out")
    assert written.spec("model.layers.0.mlp.experts.gate_up_proj").dtype == torch.bfloat16
    assert sum("experts" in row.name for block in report.blocks for row in block.rows) == 4 * 2 * 4


@pytest.mark.parametrize(
    ("tensors", "block", "message"),
    [
        ({"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, FP8, "a.weight is stored in .* no scale beside it"),
        (
            {"a.weight": torch.zeros(40, 4).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 1)},
            FP8,
            "do not fit weight_block_size",
        ),
        ({"e_blocks": torch.zeros(1, 2, 1, 16, dtype=torch.uint8)}, {"quant_method": "mxfp4"}, "no e_scales beside it"),
        ({"a.weight_packed": torch.zeros(2, 2, dtype=torch.int32)}, PACKED, "packed in a way that is not known"),
    ],
)
def test_what_cannot_be_read_is_said_from_the_headers(
    tensors: dict[str, Tensor], block: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder_with(tmp_path, tensors, block))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_encodings_are_refused_by_name(method: str, tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama(tmp_path / method)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlmsparseError, match=rf"already quantized \({method}\)"):
        llmsparse.plan(model=str(folder), output=str(tmp_path / "out"), sparsity=0.5)
