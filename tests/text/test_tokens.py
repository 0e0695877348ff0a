"""A long text gives the ids that it would give whole, and only as much of it is read as is wanted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llmsparse.text import tokens
from llmsparse.text import windows as calibration
from llmsparse.text.bos import special_tokens
from llmsparse.text.sources import Texts
from llmsparse.text.tokens import tokenize

LLAMA3 = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
KINDS: dict[str, tuple[Any, Any, Any]] = {  # model, what splits a text into words, normalizer
    "gpt2": (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    "llama3": (
        models.BPE(),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), LEVEL]),
        normalizers.NFC(),
    ),
    "llama2": (
        models.BPE(unk_token="<s>"),
        None,
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "unigram": (models.Unigram(), pre_tokenizers.Metaspace(), normalizers.NFKC()),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, text: str) -> PreTrainedTokenizerFast:
    """One of each kind that models come with, between `<s>` and `</s>`."""
    model, words, normalizer = KINDS[request.param]
    made = Tokenizer(model)
    if words is not None:
        made.pre_tokenizer = words
    if normalizer is not None:
        made.normalizer = normalizer
    special: dict[str, Any] = {"special_tokens": ["<s>", "</s>"], "show_progress": False}
    if request.param == "unigram":
        trainer: Any = trainers.UnigramTrainer(vocab_size=500, unk_token="<s>", **special)
    else:
        alphabet = [] if request.param == "llama2" else ALPHABET
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, max_token_length=16, **special)
    made.train_from_iterator(text[:30_000].splitlines(keepends=True), trainer)
    made.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def in_parts(text: str, size: int = 777) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", 8_000)


MIXED = [
    "世界你好",
    "привет ",
    "hello\n",
    "  \n\n",
    "👩‍👩‍👧 ",
    "e\u0301",
    "1234567",
    "\t\t",
    "。",
    " ",
    " the quick",
    "\r\n",
]
TEXTS = {
    "mixed": "".join(random.Random(0).choice(MIXED) for _ in range(20_000)),
    "digits": "7" * 50_000,
    "spaces": "x" + " " * 30_000 + "y",
    "short": "def f():\n",
    "nothing": "",
}


@pytest.mark.parametrize("name", ["code", *TEXTS])
@pytest.mark.usefixtures("short_pieces")
def test_pieces_give_the_ids_of_the_whole(name: str, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = text if name == "code" else TEXTS[name]
    assert [i for ids in tokenize(in_parts(whole), tokenizer) for i in ids] == tokenizer(whole)["input_ids"]


@pytest.mark.usefixtures("short_pieces")
def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_gets_the_text_whole(
    text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    class Slow:
        is_fast = False
        seen: list[int] = []  # noqa: RUF012

        def __call__(self, part: str, **options: Any) -> Any:
            self.seen.append(len(part))
            return {"input_ids": tokenizer(part, **options)["input_ids"]}

    slow: Any = Slow()
    assert list(tokenize(in_parts(text), slow)) == [tokenizer(text)["input_ids"]]
    assert max(slow.seen) == len(text)


def test_special_tokens_are_found_on_both_sides(tokenizer: PreTrainedTokenizerFast) -> None:
    assert special_tokens(tokenizer) == ([0], [1])


@pytest.mark.usefixtures("short_pieces")
def test_no_more_is_read_than_is_wanted(text: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def parts() -> Iterator[str]:
        for part in in_parts(text * 5):
            read.append(part)
            yield part

    def opened(*_: object) -> Texts:
        return Texts(iter([parts()]), False, {"file": "long.txt"})

    whole = calibration.load_evaluation("builtin", tokenizer, seq_len=32, limit=1)
    assert len(whole.ids) == 1
    monkeypatch.setattr(calibration, "open_texts", opened)
    some = calibration.load_evaluation("long.txt", tokenizer, seq_len=32, limit=20)
    assert sum(map(len, read)) < 4 * 8_000
    assert some.ids.flatten().tolist() == tokenizer(text)["input_ids"][: 20 * 32]
    read.clear()
    monkeypatch.setattr(calibration, "MAX_TOKENS", 5_000)
    drawn = calibration.load_windows("long.txt", tokenizer, seq_len=32, samples=8, seed=0)
    assert sum(map(len, read)) < len(text)
    assert drawn.protocol["read"].startswith("the first ") and drawn.protocol["read"].endswith(" tokens")
