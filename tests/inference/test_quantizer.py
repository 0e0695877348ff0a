"""Packed checkpoints in transformers: what loads computes what the dense model computes, and is saved as it was."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import windows
from safetensors.torch import load_file, save_file
from sparse import one_line, save_sparse
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

import llmsparse
from llmsparse.backends import BACKENDS
from llmsparse.errors import CheckpointError, MachineError, RecipeError
from llmsparse.inference.linear import SparseLinear
from llmsparse.inference.packed_experts import SparseExperts
from llmsparse.packing.folder import FORMAT_VERSION

# pytest has filters of its own in place of the one that the package sets
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3"]
FAMILIES = ["llama", "gpt2", "phi", "mamba", "falcon", "llama4_text", *EXPERTS]
Folders = Callable[..., tuple[Path, Path]]


def load(folder: Path, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info  # missing, unexpected and mismatched keys, and errors
    return model.requires_grad_(False)


def config(backend: str = "dense", optimize: str = "memory") -> llmsparse.SparseConfig:
    return llmsparse.SparseConfig(backend=backend, optimize=optimize)


def logits(model: Any, *shape: int) -> Tensor:
    (ids,) = windows(shape or (2, 9))
    return model(ids, use_cache=False).logits


def packed_copy(packed: Path, to: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """A copy of a packed folder to damage: the folder, its tensors in one dict, and its config."""
    tensors = {name: tensor for file in packed.glob("*.safetensors") for name, tensor in load_file(file).items()}
    shutil.copytree(packed, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to, tensors, json.loads((to / "config.json").read_text())


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_logits_are_those_of_the_pruned_model_to_the_bit(family: str, folders: Folders) -> None:
    pruned, packed = folders(family)
    assert torch.equal(logits(load(packed, quantization_config=config())), logits(load(pruned)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_is_saved_as_the_folder_that_it_came_from(family: str, folders: Folders, tmp_path: Path) -> None:
    _, packed = folders(family)
    for backend in ("dense", "dense-lowmem") if family in EXPERTS else ("dense",):
        load(packed, quantization_config=config(backend)).save_pretrained(tmp_path / backend)
        _, before, config_before = packed_copy(packed, tmp_path / f"{backend} before")
        after = load_file(tmp_path / backend / "model.safetensors")
        stored = json.loads((tmp_path / backend / "config.json").read_text())["quantization_config"]
        assert stored == config_before["quantization_config"]
        ends = ("", "_mask", "_offsets")
        assert all(
            same(before[name + end], after[name + end])
            for name in stored["layers"]
            for end in ends
            if name + end in before
        )
        assert len(before) == len(after)  # dense tensors are saved under their module's names


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_packed_while_it_loads(family: str, folders: Folders, tmp_path: Path) -> None:
    pruned, packed = folders(family)
    model = load(pruned, quantization_config=config())
    assert torch.equal(logits(model), logits(load(pruned)))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", quantization_config=config())), logits(load(pruned)))
    if family not in ("mamba", "llama4_text"):  # `pack` leaves Mamba's coefficients alone, and knows Llama 4's experts
        names = {choice.weight for choice in llmsparse.explain(model).choices}
        assert names == {choice.weight for choice in llmsparse.explain(load(packed)).choices}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_run_packed(family: str, folders: Folders) -> None:
    pruned, packed = folders(family)
    model = load(packed, quantization_config=config("dense-lowmem"))
    assert model.config._experts_implementation == "llmsparse"
    assert any(isinstance(module, SparseExperts) for module in model.modules())
    assert not [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    assert_close_to_dense(model, pruned)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 9)], ids=str)
@pytest.mark.parametrize("backend", ["dense-lowmem", "cpu-bitmask"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_backends_err_no_more_than_dense_does(
    backend: str, pattern: str, shape: tuple[int, int], folders: Folders
) -> None:
    pruned, packed = folders("llama", pattern)
    assert_close_to_dense(load(packed, quantization_config=config(backend)), pruned, *shape)


def assert_close_to_dense(model: Any, pruned: Path, *shape: int) -> None:
    """Against float64 on the same weights, its error is at most 1.2 times that of dense bfloat16."""
    exact = logits(load(pruned, experts_implementation="eager").double(), *shape)
    error, of_dense = (
        (result.double() - exact).square().mean().sqrt()
        for result in (logits(model, *shape), logits(load(pruned), *shape))
    )
    assert error <= 1.2 * of_dense


def test_transposed_weights_are_packed_by_output(folders: Folders) -> None:
    model = load(folders("gpt2")[1])
    layer = model.transformer.h[0].mlp.c_fc  # a Conv1D of 32 inputs and 128 outputs
    assert (layer.in_features, layer.out_features) == (32, 128)
    assert layer.matrix.described["transposed"] and layer.matrix.described["shape"] == [128, 32]
    assert layer.weight.shape == (32, 128)  # as the Conv1D holds it


def test_what_is_no_packed_weight_stays_what_it_was(folders: Folders) -> None:
    model = load(folders("llama")[1])
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert type(model.get_output_embeddings()) in (nn.Linear, SparseLinear)
    biased = load(folders("phi")[1])
    assert biased.model.layers[0].mlp.fc1.bias.abs().sum() > 0


def test_it_generates_as_the_pruned_model_does(folders: Folders) -> None:
    pruned, packed = folders("llama")
    (ids,) = windows((1, 5))
    dense, sparse = (
        model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids)).tolist()
        for model in (load(pruned), load(packed))
    )
    assert dense == sparse


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_continuous_batching_serves_several_prompts(folders: Folders) -> None:
    pruned, packed = folders("llama")
    prompts = [[3, 4, 5], [6, 7, 8, 9]]
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    cache = ContinuousBatchingConfig(
        num_blocks=16, max_batch_tokens=64
    )  # its own choice is most of the machine's memory
    results = []
    for folder in (pruned, packed):
        model = load(folder, attn_implementation="sdpa", dtype=torch.float32)
        answers = model.generate_batch(prompts, settings, cache)
        results.append(sorted(answer.generated_tokens for answer in answers.values()))
    assert results[0] == results[1] and [len(tokens) for tokens in results[0]] == [4, 4]


@pytest.mark.parametrize("backend", ["dense", "cpu-bitmask"])
def test_no_file_stays_mapped_behind_repacked_weights(backend: str, folders: Folders) -> None:
    _, packed = folders("llama")
    model = load(packed, quantization_config=config(backend))
    gc.collect()
    assert str(packed) not in Path("/proc/self/maps").read_text()
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_it_loads_with_a_device_map(device_map: Any, folders: Folders) -> None:
    pruned, packed = folders("llama")
    model = load(packed, device_map=device_map, quantization_config=config())
    assert torch.equal(logits(model), logits(load(pruned)))


def test_offloaded_weights_are_refused(folders: Folders, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    with pytest.raises(RecipeError, match=r"offloads model\.layers\.1"):
        load(
            folders("llama")[1],
            device_map=places | {"model.rotary_emb": "cpu", "lm_head": "cpu"},
            offload_folder=tmp_path,
        )


def test_another_dtype_is_that_of_the_dense_model(folders: Folders) -> None:
    pruned, packed = folders("llama")
    model = load(packed, dtype=torch.float32, quantization_config=config())
    assert torch.equal(logits(model), logits(load(pruned, dtype=torch.float32)))
    moved = load(packed, quantization_config=config()).to(torch.float32)
    assert torch.equal(logits(moved), logits(model))


def test_a_base_model_loads_from_the_folder_of_the_whole(folders: Folders) -> None:
    pruned, packed = folders("llama")
    (ids,) = windows((1, 5))
    base = AutoModel.from_pretrained(packed, quantization_config=config()).requires_grad_(False)
    assert isinstance(base.layers[0].mlp.up_proj, SparseLinear)
    dense = AutoModel.from_pretrained(pruned).requires_grad_(False)
    assert torch.equal(base(ids).last_hidden_state, dense(ids).last_hidden_state)


def test_a_model_without_zeros_is_not_packed(folders: Folders, tmp_path: Path) -> None:
    dense = save_sparse("llama", tmp_path / "dense", sparsity=0.0)
    with pytest.raises(CheckpointError, match="no weight has enough zeros") as caught:
        load(dense, quantization_config=config())
    one_line(caught.value)


def test_weights_without_zeros_stay_dense_beside_packed_ones(tmp_path: Path, folders: Folders) -> None:
    folder, tensors, _ = packed_copy(folders("llama")[0], tmp_path / "mixed")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder, quantization_config=config())
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(model.model.layers[1].mlp.up_proj) is SparseLinear
    assert torch.equal(logits(model), logits(load(folder)))


def test_an_unknown_backend_is_named_and_the_nearest_offered() -> None:
    with pytest.raises(RecipeError, match="did you mean 'cpu-bitmask'") as caught:
        llmsparse.SparseConfig(backend="cpu-bitmaps")
    one_line(caught.value)
    with pytest.raises(RecipeError, match="memory or speed"):
        llmsparse.SparseConfig(optimize="sped")


def test_what_runs_the_weights_is_said_in_a_few_lines(folders: Folders) -> None:
    said = str(llmsparse.explain(load(folders("llama")[1], quantization_config=config("dense-lowmem")))).splitlines()
    assert said[0] == "15 weights run by dense-lowmem: asked for"
    assert re.fullmatch(r"0\.\d MB packed, 0\.\d MB dense", said[1])
    assert "not dense: another was asked for" in said and len(said) < 8 + len(BACKENDS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend can run")
def test_a_named_backend_that_cannot_run_says_why(folders: Folders) -> None:
    with pytest.raises(MachineError, match=r"mma24 cannot run .*needs an NVIDIA GPU") as caught:
        load(folders("llama", "2:4")[1], quantization_config=config("mma24"))
    one_line(caught.value)


def test_the_environment_chooses_where_nobody_does(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSPARSE_BACKEND", "dense-lowmem")
    assert llmsparse.explain(load(folders("llama")[1])).backends == {"dense-lowmem": 15}
    assert llmsparse.explain(load(folders("llama")[1], quantization_config=config())).backends == {"dense": 15}


def test_a_newer_format_is_refused(folders: Folders, tmp_path: Path) -> None:
    folder, _, stored = packed_copy(folders("llama")[1], tmp_path / "newer")
    stored["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(
        CheckpointError, match=f"format version {FORMAT_VERSION + 1}, this llmsparse reads up to {FORMAT_VERSION}"
    ):
        load(folder)


UP = "model.layers.1.mlp.up_proj.weight"


def flip_mask(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}_mask"][3, 1] ^= 4


def shift_offset(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}_offsets"][5] += 1


def offset_out_of_range(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}_offsets"][-1] = 2**31 - 1


def shorten_values(tensors: dict[str, Tensor]) -> None:
    tensors[UP] = tensors[UP][:-1].clone()


def lose_mask(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{UP}_mask"]


@pytest.mark.parametrize("damage", [flip_mask, shift_offset, offset_out_of_range, shorten_values, lose_mask])
def test_a_damaged_weight_is_named(
    damage: Callable[[dict[str, Tensor]], None], folders: Folders, tmp_path: Path
) -> None:
    folder, tensors, _ = packed_copy(folders("llama")[1], tmp_path / "damaged")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=UP.replace(".", r"\.")) as caught:
        load(folder)
    one_line(caught.value)


def test_a_truncated_file_is_named(folders: Folders, tmp_path: Path) -> None:
    folder, _, _ = packed_copy(folders("llama")[1], tmp_path / "truncated")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        load(folder)
    one_line(caught.value)


def test_a_config_of_another_model_is_refused(folders: Folders, tmp_path: Path) -> None:
    folder, _, stored = packed_copy(folders("llama")[1], tmp_path / "other")
    (folder / "config.json").write_text(json.dumps(stored | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..*no such weight"):
        load(folder)


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import llmsparse; from transformers import AutoModelForCausalLM", marks=pytest.mark.slow),
        pytest.param("from transformers import AutoModelForCausalLM; import llmsparse", marks=pytest.mark.slow),
        pytest.param("import transformers.quantizers.auto, llmsparse", marks=pytest.mark.slow),
        pytest.param("from llmsparse import SparseConfig", marks=pytest.mark.slow),
        "import llmsparse, importlib.util; importlib.util.find_spec('transformers.quantizers.auto')",
    ],
)
def test_the_order_of_imports_does_not_matter(imports: str, folders: Folders) -> None:
    code = (
        f"{imports}\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folders('llama')[1])!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["SparseLinear"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("backend", ["dense", "dense-lowmem", "cpu-bitmask"])
def test_torch_compile_runs_it(backend: str, family: str, folders: Folders) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    model = load(folders(family)[1], quantization_config=config(backend), dtype=torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=family == "llama")
    torch.testing.assert_close(logits(compiled, 1, 1), logits(model, 1, 1))
