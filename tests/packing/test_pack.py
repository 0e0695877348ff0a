"""pack and unpack: smaller, and back to the last bit, whatever the family; what cannot be packed is refused in a line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import packed_reader
import pytest
import torch
from architectures import ARCHITECTURES, random_model, tiny_config
from safetensors.torch import load_file, save_file
from sparse import assert_same_tensors, bits, one_line, save_sparse
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.errors import CheckpointError
from llmsparse.packing.folder import RECORD, PackedCheckpoint
from llmsparse.storage.checkpoint import CheckpointReader

FAMILIES = ["llama", "gpt2", "opt", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "granitemoe"]
OTHERS = sorted(set(ARCHITECTURES) - set(FAMILIES))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse llama with a tokenizer file and a card, and `packed` beside it."""
    folder = tmp_path_factory.mktemp("packing")
    dense = save_sparse("llama", folder / "dense")
    (dense / "tokenizer.json").write_text("{}")
    (dense / "README.md").write_bytes(b"---\nlicense: mit\n---\r\n# Mine \xff\n")
    llmsparse.pack(str(dense), folder / "packed")
    return dense


def module_tensors(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {key: t for key, t in model.state_dict().items() if key not in model.all_tied_weights_keys}


def round_trip(family: str, folder: Path, pattern: str = "unstructured", **changes: Any) -> llmsparse.Packing:
    dense = save_sparse(family, folder / "dense", pattern=pattern, **changes)
    packing = llmsparse.pack(str(dense), folder / "packed")
    llmsparse.unpack(str(folder / "packed"), folder / "back")
    assert_same_tensors(dense, folder / "back")
    assert (folder / "back/config.json").read_bytes() == (dense / "config.json").read_bytes()
    return packing


@pytest.mark.parametrize("family", FAMILIES)
def test_unpack_gives_the_source_back(family: str, tmp_path: Path) -> None:
    packing = round_trip(family, tmp_path)
    assert packing.packed_bytes < packing.packed_dense_bytes and packing.bytes < packing.dense_bytes
    names = {weight.name.rpartition(".")[2] for weight in packing.weights}
    assert not names & {"embed_tokens", "wte", "gate", "router"}


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_unpack_gives_the_source_of_any_other_family_back(family: str, tmp_path: Path) -> None:
    round_trip(family, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_a_reader_written_from_the_page_reads_what_the_module_holds(family: str, tmp_path: Path) -> None:
    dense = save_sparse(family, tmp_path / "dense")
    llmsparse.pack(str(dense), tmp_path / "packed", max_shard_size="16KB")
    read = packed_reader.read(tmp_path / "packed")
    module = module_tensors(dense)
    layers = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["layers"]
    assert set(layers) <= set(module) and layers
    for name in layers:
        assert numpy.array_equal(read[name], module[name].view(torch.uint16).numpy()), name


def test_n_of_m_is_stored_as_that_where_every_group_of_inputs_obeys_it(tmp_path: Path) -> None:
    packing = round_trip("llama", tmp_path, pattern="2:4")
    assert {weight.pattern for weight in packing.weights} == {"2:4"}
    layers = PackedCheckpoint(tmp_path / "packed").layers
    keys = CheckpointReader(tmp_path / "packed").keys()
    assert all(name + "_mask" in keys and name + "_offsets" not in keys for name in layers)
    assert packing.packed_bytes == packing.packed_dense_bytes * 9 // 16


def test_one_group_that_does_not_obey_makes_it_unstructured(llama: Path, tmp_path: Path) -> None:
    dense = save_sparse("llama", tmp_path / "dense", pattern="2:4", shard="1GB")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][47, 28:] = 1
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    packing = llmsparse.pack(str(dense), tmp_path / "packed")
    odd = [weight.name for weight in [*packing.weights, *packing.left_dense] if weight.pattern != "2:4"]
    assert odd == ["model.layers.1.mlp.up_proj"]


def test_where_the_module_stores_inputs_first_the_transpose_is_packed(tmp_path: Path) -> None:
    llmsparse.pack(str(save_sparse("gpt2", tmp_path / "dense")), tmp_path / "packed")
    described = PackedCheckpoint(tmp_path / "packed").layers["transformer.h.0.attn.c_attn.weight"]
    assert (described["shape"], described["transposed"]) == ([96, 32], True)


def test_experts_are_packed_as_one_under_the_modules_name(tmp_path: Path) -> None:
    llmsparse.pack(str(save_sparse("mixtral", tmp_path / "dense")), tmp_path / "packed")
    packed = PackedCheckpoint(tmp_path / "packed")
    assert packed.layers["model.layers.0.mlp.experts.gate_up_proj"]["shape"] == [4, 96, 32]
    assert not [key for key in packed.reader.keys() if ".w1" in key]


def test_everything_else_is_carried_over_and_comes_back(llama: Path, tmp_path: Path) -> None:
    packed = llama.parent / "packed"
    assert (packed / "tokenizer.json").read_text() == "{}"
    card = (packed / "README.md").read_bytes()
    assert card.startswith(b"---\nlicense: mit\n---\n") and b"dense 0." in card and b"ratio" in card
    llmsparse.unpack(str(packed), tmp_path / "back", max_shard_size="24KB")
    for name in ("tokenizer.json", "README.md", "config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (llama / name).read_bytes()
    assert not (tmp_path / "back" / RECORD).exists()


def test_a_checkpoint_that_llmsparse_wrote_comes_back_to_the_byte(llama: Path, tmp_path: Path) -> None:
    llmsparse.unpack(str(llama.parent / "packed"), tmp_path / "a", max_shard_size="20KB")
    llmsparse.pack(str(tmp_path / "a"), tmp_path / "b")
    llmsparse.unpack(str(tmp_path / "b"), tmp_path / "c", max_shard_size="20KB")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "c").iterdir()) and len(files) > 5
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes() for name in files)


def test_without_its_record_it_unpacks_to_the_modules_names(tmp_path: Path) -> None:
    dense = save_sparse("mixtral", tmp_path / "dense")
    llmsparse.pack(str(dense), tmp_path / "packed")
    (tmp_path / "packed" / RECORD).unlink()
    llmsparse.unpack(str(tmp_path / "packed"), tmp_path / "back")
    assert "model.layers.0.mlp.experts.gate_up_proj" in CheckpointReader(tmp_path / "back").keys()
    wanted = module_tensors(dense)
    got = module_tensors(tmp_path / "back")
    assert got.keys() == wanted.keys() and all(torch.equal(bits(got[key]), bits(wanted[key])) for key in wanted)


def test_what_would_be_larger_stays_dense_and_is_listed(llama: Path, tmp_path: Path) -> None:
    dense = save_sparse("llama", tmp_path / "dense", shard="1GB")
    tensors = load_file(dense / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.weight"].fill_(0.25)
    tensors["model.layers.0.self_attn.k_proj.weight"].masked_fill_(
        tensors["model.layers.0.self_attn.k_proj.weight"] == 0, -0.0
    )
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    packing = llmsparse.pack(str(dense), tmp_path / "packed")
    assert [weight.name for weight in packing.left_dense] == [name.replace("q_proj", "k_proj"), name]
    summary = dict(packing.summary())
    assert "q_proj" in summary["left dense"] and "-0.0" in summary["negative zeros"]
    llmsparse.unpack(str(tmp_path / "packed"), tmp_path / "back")
    assert_same_tensors(dense, tmp_path / "back")


def test_negative_zeros_are_dropped_when_asked_and_nothing_else_changes(tmp_path: Path) -> None:
    dense = save_sparse("llama", tmp_path / "dense", shard="1GB")
    file = dense / "model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.dim() == 2:
            tensor.masked_fill_(tensor == 0, -0.0)  # as `w * mask` leaves it
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"places of -0\.0, which are kept without --drop-negative-zeros"):
        llmsparse.pack(str(dense), tmp_path / "packed")
    packing = llmsparse.pack(str(dense), tmp_path / "packed", drop_negative_zeros=True)
    count = sum(int((tensors[f"{weight.name}.weight"] == 0).sum()) for weight in packing.weights)
    assert dict(packing.summary())["negative zeros"].startswith(f"{count:,} places held -0.0")
    assert "with 0.0 for -0.0" in (tmp_path / "packed/README.md").read_text()
    llmsparse.unpack(str(tmp_path / "packed"), tmp_path / "back")
    packed = {f"{weight.name}.weight" for weight in packing.weights}
    wanted = {key: torch.where(t == 0, 0.0, t) if key in packed else t for key, t in tensors.items()}
    save_file(wanted, file, metadata={"format": "pt"})
    assert_same_tensors(dense, tmp_path / "back")


def test_tied_embeddings_stay_one_dense_tensor(tmp_path: Path) -> None:
    packing = round_trip("llama", tmp_path, tie_word_embeddings=True)
    assert "lm_head" not in [weight.name for weight in packing.weights]
    assert "lm_head" in [weight.name for weight in round_trip("llama", tmp_path / "untied").weights]


@pytest.mark.parametrize(("pattern", "limit"), [("unstructured", 0.37), ("2:4", 0.57)])
def test_rows_of_512_take_what_the_table_says(pattern: str, limit: float, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 512, "head_dim": 128, "num_hidden_layers": 1}
    packing = round_trip("llama", tmp_path, pattern=pattern, shard="1GB", **sizes)
    assert {weight.shape[-1] for weight in packing.weights} == {512}
    assert packing.packed_bytes / packing.packed_dense_bytes <= limit
    assert "narrow rows" not in dict(packing.summary())


PLAIN = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    print(type(AutoModelForCausalLM.from_pretrained(folder)).__name__)
"""


@pytest.mark.parametrize(("family", "name"), [("llama", "LlamaForCausalLM"), ("mixtral", "MixtralForCausalLM")])
def test_software_that_does_not_know_the_format_fails(family: str, name: str, tmp_path: Path) -> None:
    """The dense checkpoint loads in a process without llmsparse, the packed one ends it."""
    llmsparse.pack(str(save_sparse(family, tmp_path / "dense")), tmp_path / "packed")
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "dense"), str(tmp_path / "packed")],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode != 0 and run.stdout == f"{name}\n", run.stderr
    assert "RuntimeError" in run.stderr and "mismatch" in run.stderr


def refused(run: Callable[[], object], message: str, folder: Path) -> None:
    """The call fails in one line, and `folder` holds what it held."""
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CheckpointError, match=message) as error:
        run()
    one_line(error.value)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_record_that_does_not_belong_is_refused_by_its_file(llama: Path, tmp_path: Path) -> None:
    packed = Path(shutil.copytree(llama.parent / "packed", tmp_path / "packed"))
    whole = json.loads((packed / RECORD).read_text())
    one = whole["tensors"] | {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [1]}}
    for spoilt, message in (
        (whole | {"files": {}}, rf"{RECORD}: does not hold the config\.json"),
        (whole | {"tensors": one}, r"tensor 'model\.embed_tokens\.weight': got shape .* does not belong together"),
    ):
        (packed / RECORD).write_text(json.dumps(spoilt))
        refused(lambda: llmsparse.unpack(str(packed), tmp_path / "back"), message, tmp_path)


def test_a_dense_checkpoint_is_refused_as_dense(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    random_model(tiny_config("llama")).save_pretrained(dense)
    refused(lambda: llmsparse.pack(str(dense), tmp_path / "a/b"), "dense checkpoint.*0.0% zeros.*prune it", tmp_path)
    refused(lambda: llmsparse.unpack(str(dense), tmp_path / "a/b"), "dense already", tmp_path)


def test_a_packed_checkpoint_is_refused_as_packed(llama: Path, tmp_path: Path) -> None:
    packed = str(llama.parent / "packed")
    refused(lambda: llmsparse.pack(packed, tmp_path / "out"), "already packed, by llmsparse", tmp_path)
    way_back = "packed by llmsparse; restore it first: llmsparse unpack .*packed -o DIR"
    refused(lambda: llmsparse.plan(model=packed, sparsity=0.5), way_back, tmp_path)


PACK = """
import json, sys, llmsparse
from llmsparse.runs.memory import PeakMemory
import torch
with PeakMemory(torch.device("cpu")) as memory:
    llmsparse.pack(sys.argv[1], sys.argv[2])
    llmsparse.unpack(sys.argv[2], sys.argv[3])
print(json.dumps(memory.read()))
"""


@pytest.mark.slow
def test_a_checkpoint_of_1_gb_is_packed_and_unpacked_with_less_memory_than_half(tmp_path: Path) -> None:
    """Written tensor by tensor, so that the test needs no more memory than the run."""
    from llmsparse.storage.checkpoint import CheckpointWriter

    config = tiny_config(
        "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=32, num_attention_heads=8, head_dim=128
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "dense")
    specs = {name: (tuple(tensor.shape), torch.bfloat16) for name, tensor in model.state_dict().items()}
    writer = CheckpointWriter(tmp_path / "dense", specs, 10**12)
    for name, (shape, dtype) in specs.items():
        weight = torch.randn(shape, dtype=dtype)
        writer.write({name: weight.masked_fill_(torch.rand(shape) < 0.7, 0.0)})
    writer.finish()
    size = (tmp_path / "dense/model.safetensors").stat().st_size
    assert size > 0.9e9
    run = subprocess.run(
        [sys.executable, "-c", PACK, *(str(tmp_path / name) for name in ("dense", "packed", "back"))],
        check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert json.loads(run.stdout) < 0.5 * size
    assert_same_tensors(tmp_path / "dense", tmp_path / "back")
