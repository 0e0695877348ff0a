"""The language model of a model that wraps one, pruned and written on its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from wrapped import load, save_wrapped

from llmsparse.cli.app import main

WITH_A_CLASS = ("gemma3", "llava", "mistral3")


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("words") / "prose.txt"
    path.write_text(text[:12_000], encoding="utf-8")
    return path


def prune(model: Path, out: Path, prose: Path, *flags: str) -> int:
    windows = ["--calibration", str(prose), "--calibration-samples", "8", "--seq-len", "32", "--match-steps", "0"]
    return main(["prune", str(model), "-o", str(out), "--sparsity", "0.6", "--method", "wanda", *windows, *flags, "-q"])


@pytest.mark.parametrize("name", WITH_A_CLASS)
def test_alone_it_says_of_text_what_the_whole_model_says(
    name: str, tmp_path: Path, tokenizer_folder: Path, prose: Path
) -> None:
    source = save_wrapped(name, tmp_path / "source", tokenizer_folder)
    (source / "preprocessor_config.json").write_text('{"size": 28}')
    assert prune(source, tmp_path / "whole", prose) == 0
    assert prune(source, tmp_path / "alone", prose, "--text-only") == 0
    alone, info = AutoModelForCausalLM.from_pretrained(tmp_path / "alone", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "vision" not in " ".join(alone.state_dict()) and alone.config.architectures[0].endswith("ForCausalLM")
    ids = torch.randint(5, 380, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(alone.eval()(ids).logits, load(tmp_path / "whole")(input_ids=ids).logits)
    assert not (tmp_path / "alone" / "preprocessor_config.json").exists()
    assert (tmp_path / "alone" / "tokenizer.json").exists()
    cards = [(tmp_path / folder / "README.md").read_text() for folder in ("whole", "alone")]
    assert "pipeline_tag: image-text-to-text\n" in cards[0] and "pipeline_tag: text-generation\n" in cards[1]


def test_one_without_a_class_of_its_own_and_one_that_wraps_nothing_are_a_line(
    tmp_path: Path, tokenizer_folder: Path, prose: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_wrapped("qwen2_5_vl", tmp_path / "source", tokenizer_folder)
    for model, said in ((source, "no class for the language model"), ("builtin", "is a language model already")):
        capsys.readouterr()
        assert prune(Path(model), tmp_path / "out", prose, "--text-only") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --text-only: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
