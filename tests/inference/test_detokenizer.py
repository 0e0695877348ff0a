"""Pieces of text, whatever tokens come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmsparse.inference.detokenizer import Detokenizer

WORDS = ["<unk>", "▁Once", "▁upon", "▁", "b", "\n", "</s>"]


def with_byte_tokens() -> PreTrainedTokenizerFast:
    """Of Llama 2's kind: ▁ for blanks, a token for each byte, and the first blank of a text dropped."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = [*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    inner = Tokenizer(models.BPE({word: number for number, word in enumerate(vocabulary)}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


BYTES = with_byte_tokens()
FIRST_BYTE = len(WORDS)


def of(text: str) -> list[int]:
    """Token by token, a byte each."""
    return [FIRST_BYTE + byte for byte in text.encode()]


def pieces(tokenizer: Any, prompt: list[int], tokens: list[int], at_once: int = 1) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    parts = [tokens[first : first + at_once] for first in range(0, len(tokens), at_once)]
    return [*(detokenizer.take(part) for part in parts), detokenizer.end()]


@given(st.text(max_size=20), st.integers(1, 5))
def test_text_in_bytes_comes_out_as_it_is_character_by_character(text: str, at_once: int) -> None:
    said = pieces(BYTES, [1], of(text), at_once)
    assert "".join(said) == text or "\ufffd" in text
    assert all("\ufffd" not in piece for piece in said) or "\ufffd" in text


@given(st.lists(st.integers(0, len(WORDS) + 255), min_size=1, max_size=40), st.integers(1, 5))
def test_how_many_tokens_come_at_once_changes_no_text_of_words(tokens: list[int], at_once: int) -> None:
    words = [token % len(WORDS) for token in tokens]
    assert "".join(pieces(BYTES, [1], words, at_once)) == "".join(pieces(BYTES, [1], words))
    assert BYTES.decode([1]) + "".join(pieces(BYTES, [1], words)) == BYTES.decode([1, *words], skip_special_tokens=True)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_no_byte_is_lost_and_what_is_held_back_is_bounded(given_bytes: list[int]) -> None:
    detokenizer = Detokenizer(BYTES, [1])
    text = ""
    for number, byte in enumerate(given_bytes):
        text += detokenizer.take([FIRST_BYTE + byte])
        assert len(text) * 4 >= number - 2, "but for three bytes that may become a character, all is out"
    text += detokenizer.end()
    assert text.replace("\ufffd", "") == bytes(given_bytes).decode(errors="ignore")


def test_a_stray_byte_leaves_the_character_before_it_whole() -> None:
    tokens = [*of("é"), FIRST_BYTE + 0xF0, 4, 4]
    assert pieces(BYTES, [1], tokens) == ["", "é", "", "\ufffdb", "b", ""]


def test_a_blank_at_the_start_stays_and_the_end_of_half_a_character_is_said() -> None:
    assert pieces(BYTES, [1], [2, 3, *of("€")[:2]]) == [" upon", " ", "", "", "\ufffd\ufffd"]


def test_special_tokens_are_left_out_unless_they_are_wanted() -> None:
    assert pieces(BYTES, [1], [2, 6]) == [" upon", "", ""]
    wanted = Detokenizer(BYTES, [1], skip_special_tokens=False)
    assert wanted.take([2, 6]) == " upon</s>"


def test_tokens_without_text_do_not_pile_up() -> None:
    class Counting:
        longest = 0

        def decode(self, ids: list[int], **options: Any) -> str:
            self.longest = max(self.longest, len(ids))
            return str(BYTES.decode(ids, **options))

    counting = Counting()
    assert "".join(pieces(counting, [1], [2, *[6] * 500, 2, 3, 4])) == " upon upon b"
    assert counting.longest < 20


@pytest.mark.parametrize("written", ["日本語 – a b  c\n\n", "x = 'é€😀'\n", "   a"])
def test_a_byte_level_vocabulary_says_the_same(tokenizer_folder: Path, written: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert "".join(pieces(tokenizer, tokenizer("def ")["input_ids"], tokenizer(written)["input_ids"])) == written
