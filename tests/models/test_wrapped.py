"""A model that wraps a language model: the language model is streamed where it lies, and the rest is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import stream
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer
from wrapped import WRAPPED, image_prompt, load, save_wrapped

import llmsparse
from llmsparse.inference.load import load_model
from llmsparse.models.streamed import StreamedModel
from llmsparse.storage.checkpoint import CheckpointReader

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
IMAGES = ("gemma3", "llava", "qwen2_5_vl")


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(text[:12_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=IMAGES)
def pruned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, prose: Path
) -> tuple[str, Path, Path]:
    """(family, its checkpoint, the same pruned to 70 %)."""
    root = tmp_path_factory.mktemp(request.param)
    source = save_wrapped(request.param, root / "source", tokenizer_folder)
    (source / "preprocessor_config.json").write_text('{"size": 28}')
    llmsparse.prune(
        model=str(source), output=str(root / "pruned"), sparsity=0.7, method="wanda", calibration=str(prose),
        calibration_samples=4, seq_len=32, device="cpu", dtype="float32", match_steps=2,
    )  # fmt: skip
    return request.param, source, root / "pruned"


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", WRAPPED)
def test_logits_of_text_are_those_of_the_whole_model_to_the_bit(name: str, tmp_path: Path) -> None:
    folder = save_wrapped(name, tmp_path)
    model = stream(folder)
    ids = torch.randint(5, 380, (2, 12), generator=torch.Generator().manual_seed(1))
    acts = model.embed([ids])
    for block in model.blocks():
        acts = block.run(acts)
    with torch.no_grad():
        assert torch.equal(model.logits(acts.hidden[0]), load(folder)(input_ids=ids).logits)


def test_what_reads_images_is_never_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_wrapped("gemma3", tmp_path)
    seen: list[str] = []
    read = CheckpointReader.read

    def watched(reader: CheckpointReader, keys: Sequence[str]) -> dict[str, Tensor]:
        seen.extend(keys)
        return read(reader, keys)

    monkeypatch.setattr(CheckpointReader, "read", watched)
    model = StreamedModel(CheckpointReader(folder), device=torch.device("cpu"), dtype=torch.float32)
    acts = model.embed([torch.arange(5, 17)[None]])
    for block in model.blocks():
        acts = block.run(acts)
    model.logits(acts.hidden[0])
    assert any("language_model" in key for key in seen)
    assert not [key for key in seen if "vision" in key or "projector" in key]


def test_only_matrices_of_the_language_model_are_pruned_and_the_rest_is_the_same_bytes(
    pruned: tuple[str, Path, Path],
) -> None:
    _, source, folder = pruned
    before, after = tensors(source), tensors(folder)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys()
    assert changed and all("layers" in key and "vis" not in key and before[key].dim() == 2 for key in changed)
    for key in changed:
        assert (after[key] == 0).double().mean().item() == pytest.approx(0.7, abs=0.02)
    assert (folder / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()


def test_an_image_prompt_gives_what_the_original_gives_with_these_weights(pruned: tuple[str, Path, Path]) -> None:
    name, source, folder = pruned
    prompt = image_prompt(name)
    result, by_hand = load(folder), load(source)
    with torch.no_grad():
        dense = by_hand(**prompt).logits
        by_hand.load_state_dict(result.state_dict())
        sparse = result(**prompt).logits
        assert torch.equal(sparse, by_hand(**prompt).logits) and not torch.equal(sparse, dense)
        prompt["pixel_values"] = prompt["pixel_values"] + 1.0
        assert not torch.equal(sparse, result(**prompt).logits)  # the image is seen


def test_packed_it_loads_in_its_class_and_computes_the_same(pruned: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, _, folder = pruned
    llmsparse.pack(folder, tmp_path / "packed")
    packed = load(tmp_path / "packed")
    with torch.no_grad():
        torch.testing.assert_close(packed(**image_prompt(name)).logits, load(folder)(**image_prompt(name)).logits)
    report: Any = llmsparse.inspect(tmp_path / "packed")
    assert report.sparsity > 0.1
    llmsparse.unpack(tmp_path / "packed", tmp_path / "back")
    assert all(torch.equal(tensors(folder)[key], tensor) for key, tensor in tensors(tmp_path / "back").items())


def test_perplexity_and_greedy_text_are_those_of_the_whole_model(
    pruned: tuple[str, Path, Path], prose: Path, tmp_path: Path
) -> None:
    _, _, folder = pruned
    measured = llmsparse.perplexity(folder, prose, seq_len=32, dtype="float32", device="cpu")
    model: Any = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prose.read_text(), verbose=False, return_tensors="pt", add_special_tokens=False).input_ids[0]
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        logits = model(input_ids=windows).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        greedy = model.generate(windows[:1], max_new_tokens=8, do_sample=False)[0, 32:]
    assert measured.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)

    llmsparse.pack(folder, tmp_path / "packed")
    packed = load_model(tmp_path / "packed", device=torch.device("cpu"), dtype="float32")
    assert torch.equal(packed.generate(windows[:1], max_new_tokens=8, do_sample=False)[0, 32:], greedy)
