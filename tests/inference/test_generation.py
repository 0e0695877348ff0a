"""Text from dense, pruned and packed folders, and what it cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import save_random, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import llmsparse
from llmsparse.cli.app import main
from llmsparse.inference.generate import Clock

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
PROMPT = "def parse("


@pytest.fixture(scope="module")
def pruned(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("llama") / "pruned", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "proj" in name:
            tensor.masked_fill_(torch.rand(tensor.shape, generator=generator) < 0.7, 0.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def packed(pruned: Path) -> Path:
    folder = pruned.with_name("packed")
    llmsparse.pack(str(pruned), folder)
    return folder


def test_packed_text_is_that_of_the_pruned_model(pruned: Path, packed: Path) -> None:
    pieces: list[str] = []
    dense = llmsparse.generate(str(pruned), PROMPT, max_new_tokens=6, write=pieces.append)
    assert dense.text == "".join(pieces) and dense.new_tokens == 6 and dense.backends == {}
    sparse = llmsparse.generate(str(packed), PROMPT, max_new_tokens=6, backend="dense")
    assert sparse.text == dense.text and sparse.backends == {"dense": 14}
    while_loading = llmsparse.generate(str(pruned), PROMPT, max_new_tokens=6, backend="dense-lowmem")
    assert while_loading.backends == {"dense-lowmem": 14}


def test_a_mixture_says_what_runs_its_experts(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_random(tiny_config("mixtral", vocab_size=384), tmp_path)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    stock = llmsparse.generate(str(folder), PROMPT, max_new_tokens=6, experts="grouped_mm")
    assert stock.experts == {"grouped_mm": 2} and "grouped_mm runs 2 modules of experts" in stock.summary()
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", PROMPT, "--max-new-tokens", "6", "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert ours["text"] == stock.text and [name.split()[0] for name in ours["experts"]] == ["llmsparse"]
    few = ["--prompt", PROMPT, "--max-new-tokens", "6"]
    assert main(["generate", str(folder), *few, "--experts", "group_mm"]) == 2
    assert "did you mean 'grouped_mm'?" in capsys.readouterr().err


def test_it_counts_tokens_time_and_memory(packed: Path) -> None:
    result = llmsparse.generate(str(packed), PROMPT, max_new_tokens=3)
    assert result.new_tokens == 3 and result.prompt_tokens > 0
    assert result.tokens_per_second is not None and result.tokens_per_second > 0
    assert result.first_token_seconds > 0 and result.load_seconds > 0
    assert result.memory_bytes > 2**26 and result.peak_memory_bytes > 2**26
    one = llmsparse.generate(str(packed), PROMPT, max_new_tokens=1)
    assert one.new_tokens == 1 and one.tokens_per_second is None
    assert "tokens/s" not in one.summary() and "\n" not in one.summary()


def test_the_command_streams_text_and_keeps_figures_apart(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(packed), "--prompt", PROMPT, "--max-new-tokens", "4", "--backend", "dense"]) == 0
    out, error = capsys.readouterr()
    assert "dense runs 14 weights" in error and "tokens/s" in error and "tokens/s" not in out
    assert main(["generate", str(packed), "--prompt", PROMPT, "--max-new-tokens", "4", "--json"]) == 0
    document, error = capsys.readouterr()
    assert out == PROMPT + json.loads(document)["text"] + "\n" and "tokens/s" not in error


def test_pieces_are_the_text_that_the_whole_would_be() -> None:
    """Blanks at the start of a word and of a line stay, and a character of several tokens comes when it is whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "\u2581Once",
        "\u2581upon",
        "\u2581a",
        "\n",
        "\u2581\u2581",
        "def",
        *(f"<0x{b:02X}>" for b in "é€".encode()),
    ]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    prompt, new = [1], [2, 3, 4, 5, 6, 3, 7, 8, 9, 10, 11, 4, 3, 7]
    pieces: list[str] = []

    clock = Clock(tokenizer, prompt, torch.device("cpu"), pieces.append)
    clock.put(torch.tensor([prompt]))
    for token in new:
        clock.put(torch.tensor([token]))
    clock.end()

    assert tokenizer.decode(prompt) + clock.text == tokenizer.decode(prompt + new)
    assert pieces[:5] == [" upon", " a", "\n", "  ", "def"] and "".join(pieces) == clock.text
    assert "é" in pieces and "€" in pieces and pieces[-1] == "\ufffd", "a character that never becomes whole"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--backend", "mma25"], 2, "did you mean 'mma24'?"),
        (
            ["--backend", "bitmask"],
            3,
            "cannot run model.layers.0.mlp.down_proj.weight: needs an NVIDIA GPU",
        ),
        (["--optimize", "sped"], 2, "choose memory or speed"),
        (["--dtype", "float17"], 2, "did you mean 'float16'?"),
        (["--max-new-tokens", "128"], 2, "more than the model's 128 positions"),
        (["--prompt", ""], 2, "the prompt has no tokens"),
        (["--prompt", "caf\udce9"], 2, "the prompt is not UTF-8"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else None,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend can run")
def test_bad_input_is_one_line(
    options: list[str], code: int, said: str, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(packed), "--prompt", PROMPT, *options]) == code
    out, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if line and "Loading weights" not in line]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_a_model_that_says_nan_is_an_error(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(pruned, tmp_path / "nan"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["generate", str(folder), "--prompt", PROMPT]) == 1
    assert "the model's logits are NaN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        (
            '{"repetition_penalty": 0}',
            "transformers cannot generate by it: `penalty` has to be a strictly positive float",
        ),
        ('{"eos_token_id": "x"}', "transformers cannot generate by it"),
        ('{"bad_words_ids": [[1000000000]]}', "transformers cannot generate by it"),
    ],
)
def test_settings_that_cannot_be_followed_are_one_line(
    content: str, said: str, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(pruned, tmp_path / "odd"))
    (folder / "generation_config.json").write_text(content)
    assert main(["generate", str(folder), "--prompt", PROMPT]) == 2
    assert f"generation_config.json: {said}" in capsys.readouterr().err


def test_a_tokenizer_that_grew_without_its_model_is_one_line(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(pruned, tmp_path / "grown"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(folder)
    assert main(["generate", str(folder), "--prompt", "<|im_start|>"]) == 2
    assert "token 384 is none of the model's, which are 0 to 383" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_used_is_one_line(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(pruned, tmp_path / "odd"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "long"}))
    assert main(["generate", str(folder), "--prompt", PROMPT]) == 2
    assert "tokenizer cannot be loaded: '>' not supported" in capsys.readouterr().err


def test_a_folder_that_lacks_tensors_is_refused(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "lacking"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["generate", str(folder), "--prompt", PROMPT]) == 2
    assert "'model.norm.weight' among them" in capsys.readouterr().err
