"""A streamed model is the whole model: same logits to the bit, same tensors under the same names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, random_model, save_random, stream, tiny_config, windows
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmsparse.errors import CheckpointError, NumericalError
from llmsparse.models.streamed import StreamedModel
from llmsparse.models.tap import Tap
from llmsparse.storage.checkpoint import CheckpointReader

CPU = torch.device("cpu")


def whole(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers loads it. It maps the files, where tensors lie at odd addresses, and wants gradients:
    both choose other kernels, which differ in the last bit."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval().requires_grad_(False)


def streamed_logits(model: StreamedModel, batches: list[Tensor]) -> list[Tensor]:
    acts = model.embed(batches)
    for index in range(len(model.block_names)):
        block = model.block(index)
        acts = block.run(acts)
        block.evict()
    return [model.logits(hidden) for hidden in acts.hidden]


@dataclass
class Family:
    name: str
    folder: Path
    model: StreamedModel


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    folder = save_random(tiny_config(request.param), tmp_path_factory.mktemp(request.param))
    assert len(list(folder.glob("*.safetensors"))) > 1
    yield Family(request.param, folder, stream(folder))


def test_logits_are_those_of_the_whole_model_to_the_bit(family: Family) -> None:
    batches = windows((2, 24), (2, 24), (1, 11))
    reference = whole(family.folder)
    with torch.no_grad():
        wanted = [reference(ids, use_cache=False).logits for ids in batches]
    for got, want in zip(streamed_logits(family.model, batches), wanted, strict=True):
        assert torch.equal(got, want)


def test_module_tensors_go_back_to_disk_under_their_own_names(family: Family) -> None:
    for index in range(len(family.model.block_names)):
        block = family.model.block(index)
        back = block.on_disk(dict(block.module.state_dict()))
        assert set(back) == set(block.stored) == set(family.model.block_keys(index))
        for key, tensor in block.stored.items():
            assert torch.equal(back[key], tensor), key
        block.evict()
    keys = [key for index in range(len(family.model.block_names)) for key in family.model.block_keys(index)]
    assert sorted(keys + family.model.outside_keys) == sorted(CheckpointReader(family.folder).keys())


def test_dtypes_parameters_and_buffers_are_those_of_from_pretrained(family: Family) -> None:
    model, reference = stream(family.folder, torch.bfloat16), whole(family.folder, torch.bfloat16)
    assert model.embed([]).hidden == []
    for index, name in enumerate(model.block_names):
        block, wanted = model.block(index), reference.get_submodule(name)
        for part in ("named_parameters", "named_buffers"):
            own, theirs = dict(getattr(block.module, part)()), dict(getattr(wanted, part)())
            assert own.keys() == theirs.keys()
            assert [t.dtype for t in own.values()] == [theirs[n].dtype for n in own]
            assert all(torch.equal(tensor, theirs[n]) for n, tensor in own.items())
        block.evict()


NOT_PRUNED = r"norm|ln_|conv1d|router|\.gate\.weight|shared_expert_gate|x_proj|dt_proj|A_log|sinks|bias"


def test_every_matrix_of_a_block_is_prunable_but_routers_and_coefficients(family: Family) -> None:
    reader = CheckpointReader(family.folder)
    for index in range(len(family.model.block_names)):
        matrices = {key for key in family.model.block_keys(index) if len(reader.spec(key).shape) > 1}
        weights = family.model.weights(index)
        assert {w.key for w in weights if w.prunable} == {key for key in matrices if not re.search(NOT_PRUNED, key)}
        for key in {weight.key for weight in weights}:
            of_key = [weight for weight in weights if weight.key == key]
            assert sum(w.shape[0] * w.shape[1] for w in of_key) == torch.Size(reader.spec(key).shape).numel()
        assert len({weight.name for weight in weights}) == len(weights)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("llama", num_hidden_layers=3)
    return save_random(config, tmp_path_factory.mktemp("llama"))


def edit(folder: Path, target: Path, change: Any) -> Path:
    """A copy of a checkpoint in one file, its tensors passed through `change`."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    change(tensors)
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def test_a_bfloat16_checkpoint_computes_in_float32(tmp_path: Path) -> None:
    for name in ("llama", "deepseek_v3"):
        random_model(tiny_config(name)).to(torch.bfloat16).save_pretrained(tmp_path / name)
        batches = windows((2, 24))
        model, reference = stream(tmp_path / name), whole(tmp_path / name)
        with torch.no_grad():
            wanted = reference(batches[0], use_cache=False).logits
        assert wanted.dtype == torch.float32
        assert torch.equal(streamed_logits(model, batches)[0], wanted)
        assert {tensor.dtype for tensor in model.block(0).stored.values()} == {torch.bfloat16}


def test_weights_need_no_tensor(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(CheckpointReader, "read")
    model = stream(llama)
    assert [weight.name for weight in model.weights(1)] == [
        f"model.layers.1.{part}_proj"
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ]


def test_only_what_is_in_use_is_in_memory(llama: Path) -> None:
    def real() -> set[str]:
        return {n for n, p in model._model.named_parameters() if not p.is_meta}

    model = stream(llama)
    assert real() == set()
    model.embed(windows((2, 16)))
    assert real() == {"model.norm.weight"}
    block = model.block(1)
    assert real() == {"model.norm.weight", *(f"model.layers.1.{name}" for name, _ in block.module.named_parameters())}
    block.evict()
    assert block.stored == {}
    model.logits(torch.zeros(1, 4, 32))
    assert real() == {"model.norm.weight", "lm_head.weight"}
    model.block(2).evict()
    assert real() == {"model.norm.weight"}


def test_tied_embeddings_are_dropped_and_come_back_for_the_logits(tmp_path: Path) -> None:
    folder = save_random(tiny_config("gemma2", final_logit_softcapping=5.0), tmp_path)
    model, batches = stream(folder), windows((2, 24))
    acts = model.embed(batches)
    assert all(p.is_meta for n, p in model._model.named_parameters(remove_duplicate=False) if "norm" not in n)
    assert "lm_head.weight" not in model.outside_keys
    assert model.head() is None and model.head_weights() == []
    with torch.no_grad():
        wanted = whole(folder)(batches[0], use_cache=False).logits
    assert torch.equal(streamed_logits(model, batches)[0], wanted)
    assert acts.hidden[0].shape == (2, 24, 32)


@pytest.mark.parametrize("held", ["model.embed_tokens.weight", "lm_head.weight"])
def test_either_of_two_tied_embeddings_may_be_the_one_on_disk(held: str, tmp_path: Path) -> None:
    folder = save_random(tiny_config("llama", tie_word_embeddings=True), tmp_path)
    folder = edit(folder, tmp_path / "edited", lambda t: t.update({held: t.pop("model.embed_tokens.weight")}))
    batches = windows((2, 24))
    with torch.no_grad():
        wanted = whole(folder)(batches[0], use_cache=False).logits
    assert torch.equal(streamed_logits(stream(folder), batches)[0], wanted)


def test_logits_of_some_tokens_are_those_of_all(llama: Path) -> None:
    model, batches = stream(llama), windows((2, 24))
    acts = model.embed(batches)
    logits = model.logits(acts.hidden[0])
    assert logits.shape == (2, 24, model.vocabulary)
    chunks = torch.cat([model.logits(acts.hidden[0][:, start : start + 7]) for start in range(0, 24, 7)], dim=1)
    torch.testing.assert_close(chunks, logits, rtol=1e-5, atol=1e-5)


def test_embedding_runs_neither_blocks_nor_head(llama: Path) -> None:
    model, ran = stream(llama), list[str]()
    for name in (*model.block_names, "model.norm", "lm_head"):
        model._model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    model.embed(windows((2, 16)))
    assert ran == model.block_names[:-1]  # recorders in their place; the last one ends the pass


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bloom", "qwen3_next"])
def test_eight_batches_hold_each_mask_and_table_once(name: str, tmp_path: Path) -> None:
    model = stream(save_random(tiny_config(name), tmp_path))
    batches = [windows((2, 24), seed=seed)[0] for seed in range(8)]
    one, eight = model.embed(batches[:1]), model.embed(batches)
    distinct = [{id(t.untyped_storage()) for t in acts.arguments()} for acts in (one, eight)]
    assert 0 < len(distinct[0]) == len(distinct[1])
    hidden = batches[0].numel() * 32 * 4
    assert eight.nbytes - one.nbytes == 7 * hidden


def test_batches_of_other_shapes_have_tables_of_their_own(llama: Path) -> None:
    acts = stream(llama).embed(windows((2, 24), (2, 24), (1, 11)))
    tables = [call.kwargs["position_embeddings"][0] for call in acts.calls[0]]
    assert tables[0] is tables[1] and tables[2].shape[1] == 11
    assert acts.calls[2][0].kwargs["position_embeddings"][0] is tables[0]


def test_activations_may_be_kept_elsewhere_and_written_over(llama: Path) -> None:
    model, batches = stream(llama), windows((2, 24), (1, 11))
    acts, block = model.embed(batches), model.block(0)
    fresh = block.run(acts)
    assert fresh is not acts and not torch.equal(fresh.hidden[0], acts.hidden[0])
    held = acts.like([hidden.clone() for hidden in acts.hidden])
    assert block.run(held, into=held) is held
    assert all(torch.equal(a, b) for a, b in zip(held.hidden, fresh.hidden, strict=True))
    assert torch.equal(block.call(acts, 0, hidden=acts.hidden[0][:1]), fresh.hidden[0][:1])


def test_the_module_follows_what_is_stored_only_when_told(llama: Path) -> None:
    block = stream(llama).block(0)
    weight = block.weights[0]
    before = block.module.get_parameter(weight.slot[0]).clone()
    block.store(weight, torch.full(weight.shape, -0.0))
    assert torch.equal(block.module.get_parameter(weight.slot[0]), before)
    block.reload()
    now = block.module.get_parameter(weight.slot[0])
    assert not now.any() and not now.signbit().any()


def test_a_value_that_the_stored_dtype_does_not_reach_is_an_error_that_names_the_weight(tmp_path: Path) -> None:
    random_model(tiny_config("llama")).to(torch.float16).save_pretrained(tmp_path)
    block = stream(tmp_path).block(0)
    weight = block.weights[3]
    before = block.view(weight).clone()
    with pytest.raises(
        NumericalError, match=r"model\.layers\.0\.self_attn\.o_proj: the update made it 70000, .* float16"
    ):
        block.store(weight, torch.full(weight.shape, -7e4))
    assert torch.equal(block.view(weight), before)
    block.store(weight, torch.full(weight.shape, 65000.0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "granitemoe", "llama4_text"])
def test_views_are_disjoint_windows_into_what_is_stored(name: str, tmp_path: Path) -> None:
    block = stream(save_random(tiny_config(name), tmp_path)).block(1)
    for tensor in block.stored.values():
        tensor.zero_()
    for number, weight in enumerate(block.weights, start=1):
        assert tuple(block.view(weight).shape) == weight.shape
        assert not block.view(weight).any()
        block.view(weight).fill_(number)
    for number, weight in enumerate(block.weights, start=1):
        assert (block.view(weight) == number).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "granitemoe", "llama4_text", "jamba"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
def test_masks_and_tuned_values_pass_between_disk_and_module(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = stream(save_random(tiny_config(name), tmp_path)).block(1)
    tensors = {key: torch.rand(tensor.shape).mul(2).to(dtype) for key, tensor in block.stored.items()}
    tensors = {key: tensor < 1 if dtype == torch.bool else tensor for key, tensor in tensors.items()}
    inside = block.in_module(tensors)
    assert {name: tensor.shape for name, tensor in inside.items()} == {
        name: tensor.shape for name, tensor in block.module.state_dict().items()
    }
    assert {tensor.dtype for tensor in inside.values()} == {dtype}
    back = block.on_disk(inside)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    weight = next(weight for weight in block.weights if weight.prunable)
    assert torch.equal(block.view(weight, back), weight.view(tensors))
    one = weight.slot[0]
    assert weight.key in block.on_disk({one: inside[one]})


def test_a_mask_goes_where_its_weight_goes(tmp_path: Path) -> None:
    block = stream(save_random(tiny_config("qwen3_moe"), tmp_path)).block(0)
    weight = next(weight for weight in block.weights if weight.name.endswith("experts.2.up_proj"))
    mask = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in block.stored.items()}
    block.view(weight, mask)[3] = True
    block.view(weight)[3] = 7.0
    block.reload()
    sevens = {name: p == 7.0 for name, p in block.module.named_parameters() if (p == 7.0).any()}
    moved = {name: tensor for name, tensor in block.in_module(mask).items() if tensor.any()}
    assert sevens.keys() == moved.keys() == {weight.slot[0]}
    assert torch.equal(sevens[weight.slot[0]], moved[weight.slot[0]])


def test_an_untied_head_is_a_last_block_of_one_weight(llama: Path) -> None:
    model, batches = stream(llama), windows((2, 24), (1, 11))
    reference, entering = whole(llama), list[Tensor]()
    reference.lm_head.register_forward_pre_hook(lambda _, args: entering.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        wanted = [reference(ids, use_cache=False).logits for ids in batches]
    acts = model.embed(batches)
    for index in range(3):
        acts = model.block(index).run(acts)
    head = model.head()
    assert head is not None and head.weights == model.head_weights()
    (weight,) = head.weights
    assert (weight.name, weight.kind, weight.prunable, weight.shape) == ("lm_head", "head", False, (97, 32))
    seen: list[Tensor] = []
    assert head.run(acts, Tap(head, lambda slot, x: seen.append(x.clone()))) is acts
    assert all(torch.equal(x, y) for x, y in zip(seen, entering, strict=True))
    assert torch.equal(model.logits(acts.hidden[0]), wanted[0])
    head.store(weight, torch.zeros(weight.shape))
    head.reload()
    head.evict()
    assert not model.logits(acts.hidden[0]).any()


def test_tensors_unknown_to_the_model_stay_outside(llama: Path, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "mtp.head": torch.ones(2, 2)}
    model = stream(edit(llama, tmp_path / "extra", lambda tensors: tensors.update(extra)))
    assert set(extra) <= set(model.outside_keys)
    assert not any(key in extra for index in range(3) for key in model.block_keys(index))
    assert torch.equal(streamed_logits(model, windows((2, 24)))[0], streamed_logits(stream(llama), windows((2, 24)))[0])


def test_a_checkpoint_with_older_names_keeps_them(tmp_path: Path) -> None:
    folder = save_random(tiny_config("gpt2"), tmp_path / "new")

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("transformer.").replace("ln_1.weight", "ln_1.weight")] = tensors.pop(key)

    old = edit(folder, tmp_path / "old", rename)
    model = stream(old)
    assert "h.0.attn.c_attn.weight" in model.block_keys(0)
    assert model.weights(0)[0].name == "h.0.attn.c_attn"
    block = model.block(0)
    assert block.on_disk(dict(block.module.state_dict())).keys() == block.stored.keys()
    assert torch.equal(streamed_logits(model, windows((2, 9)))[0], streamed_logits(stream(folder), windows((2, 9)))[0])


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        stream(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_missing_tensors_are_named(llama: Path, tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    assert lost in refused(edit(llama, tmp_path / "block", lambda tensors: tensors.pop(lost)))
    assert "lm_head.weight" in refused(edit(llama, tmp_path / "head", lambda tensors: tensors.pop("lm_head.weight")))


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    folder = save_random(tiny_config("mixtral"), tmp_path / "whole")
    lost = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    assert "experts.gate_up_proj" in refused(edit(folder, tmp_path / "part", lambda tensors: tensors.pop(lost)))


def test_a_config_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = edit(llama, tmp_path / "other", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "2048" in refused(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    assert "model.layers.3" in refused(folder)
