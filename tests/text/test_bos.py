"""Where the token that begins a text stands: where the tokenizer puts it, or where it is told to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from llmsparse.cli.app import main
from llmsparse.errors import CalibrationError
from llmsparse.text.bos import Bos
from llmsparse.text.tokens import tokenize
from llmsparse.text.windows import load_evaluation, load_windows

TEXTS = ["one text about numbers", "another text", "and the last of three texts"]


def tokenizer_of(folder: Path, *, marks: bool) -> Any:
    """One that puts a BOS before every text, or none."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if marks:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return tokenizer


@pytest.fixture
def texts(tmp_path: Path) -> str:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize(("bos", "count"), [("each", 3), ("once", 1), ("none", 0), (None, None)])
def test_a_bos_stands_before_each_text_the_first_or_none(
    marks: bool, bos: Bos | None, count: int | None, texts: str, tokenizer_folder: Path
) -> None:
    tokenizer = tokenizer_of(tokenizer_folder, marks=marks)
    windows = load_evaluation(texts, tokenizer, seq_len=2, bos=bos)
    ids = windows.ids.flatten().tolist()
    assert ids.count(tokenizer.bos_token_id) == (3 * marks if count is None else count)
    assert bos in (None, "none") or ids[0] == tokenizer.bos_token_id
    said = windows.protocol["special_tokens"]
    assert (
        said
        == {0: "none", 1: "<s>, once per text, BOS before the first text alone", 3: "<s>, once per text"}[
            3 * marks if count is None else count
        ]
    )


@pytest.mark.parametrize("bos", [True, False])
def test_a_text_in_pieces_has_it_where_a_whole_one_has(
    bos: bool, tokenizer_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(tokenizer_folder, marks=not bos)
    whole = [token for ids in tokenize([text[:60_000]], tokenizer, bos) for token in ids]
    monkeypatch.setattr("llmsparse.text.tokens.PIECE", 20_000)
    assert [token for ids in tokenize([text[:60_000]], tokenizer, bos) for token in ids] == whole
    assert (whole[0] == tokenizer.bos_token_id) is bos


def test_a_tokenizer_without_one_is_a_line(texts: str, tokenizer_folder: Path) -> None:
    tokenizer = tokenizer_of(tokenizer_folder, marks=False)
    tokenizer.bos_token = None
    with pytest.raises(CalibrationError, match=r"--bos: tokenizer .* has no BOS token; leave --bos out, or give none"):
        load_windows(texts, tokenizer, seq_len=2, samples=2, seed=0, bos="each")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--bos", "always"], "bos"),
        (["--bos", "none", "--calibration", "self"], "self: the model writes its text as it begins one itself"),
    ],
)
def test_what_it_cannot_mean_is_a_line(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "builtin", "--sparsity", "0.5", "-o", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
