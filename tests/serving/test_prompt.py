"""From texts and ids to what the model reads, and what that may cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmsparse.serving.prompt import Prompt, Prompts, room_for_answer
from llmsparse.serving.refusal import RefusedError
from llmsparse.serving.request import CHAT, COMPLETION, Asked, read
from llmsparse.serving.template import ChatTemplate

CONTEXT, ROWS = 64, 384


class Counting:
    """A tokenizer that remembers how much it was given."""

    def __init__(self, folder: Path) -> None:
        self.inner = AutoTokenizer.from_pretrained(folder)
        self.read = 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.read += len(text)
        return self.inner(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture
def counting(tokenizer_folder: Path) -> Counting:
    return Counting(tokenizer_folder)


@pytest.fixture
def prompts(counting: Counting) -> Prompts:
    counting.inner.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return Prompts(counting, ChatTemplate(counting, "m"), CONTEXT, ROWS)


def asked(prompt: Any) -> Asked:
    return read(COMPLETION, {"prompt": prompt}, frozenset({"m"}), "m")


def test_texts_and_ids_one_or_several(prompts: Prompts, counting: Counting) -> None:
    ids = tuple(counting.inner("def main(")["input_ids"])
    assert prompts.read(asked("def main(")) == [Prompt(ids, "def main(")]
    assert prompts.read(asked(["def main(", "x"]))[0] == Prompt(ids, "def main(")
    assert prompts.read(asked([5, 6, 7])) == [Prompt((5, 6, 7), None)]
    assert prompts.read(asked([[5, 6], [7]])) == [Prompt((5, 6), None), Prompt((7,), None)]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (None, "wanted a text, token ids"),
        ("", "no tokens"),
        ([], "at least one"),
        ([""], "no tokens"),
        ([[]], "wanted a text"),
        ([5, "x"], "wanted a text"),
        ([True], "wanted a text"),
        ([[5, None]], "wanted a text"),
        ({"text": "x"}, "wanted a text"),
        ([384], "token 384 is none"),
        ([5, -1], "token -1 is none"),
        ([10**30], "is none of the model's"),
        ([5] * 65, "65 tokens; prompt and answer together fit 64"),
        (["x"] * 129, "at most 128"),
        ("\ud800", "half of a surrogate pair"),
        ("x1y2" * 40, "together fit 64"),
    ],
    ids=lambda value: str(value.encode("ascii", "replace") if isinstance(value, str) else value)[:20],
)
def test_what_cannot_be_read_is_refused(prompts: Prompts, prompt: Any, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        prompts.read(asked(prompt))


def test_a_text_that_cannot_fit_is_refused_unread(prompts: Prompts, counting: Counting) -> None:
    with pytest.raises(RefusedError, match="1000000 bytes, and no token of this model has more than"):
        prompts.read(asked("x" * 10**6))
    with pytest.raises(RefusedError, match="messages: 1000000 bytes"):
        prompts.read(read(CHAT, {"messages": [{"role": "user", "content": "x" * 10**6}]}, frozenset({"m"}), "m"))
    with pytest.raises(RefusedError, match="messages: 65 of them are more than 64 tokens"):
        prompts.read(read(CHAT, {"messages": [{"role": "user", "content": ""}] * 65}, frozenset({"m"}), "m"))
    assert counting.read == 0


def test_a_long_text_is_read_only_until_it_is_known_not_to_fit(tokenizer_folder: Path, counting: Counting) -> None:
    counting.inner.add_tokens(["long" * 10_000])  # so that bytes say little
    prompts = Prompts(counting, ChatTemplate(counting, "m"), CONTEXT, ROWS)
    with pytest.raises(RefusedError, match="more than 128 tokens"):
        prompts.read(asked("x = 1\n" * 100_000))
    assert counting.read <= 16 * CONTEXT


def test_an_answer_has_room_for_what_was_asked_or_for_what_is_left() -> None:
    def room(tokens: int, new: int | None) -> int:
        body = {"prompt": "x"} if new is None else {"prompt": "x", "max_tokens": new}
        return room_for_answer(Prompt((5,) * tokens, None), read(COMPLETION, body, frozenset({"m"}), "m"), 100, 50)

    assert [room(40, None), room(70, None), room(40, 60), room(100, 0)] == [50, 30, 60, 0]
    with pytest.raises(RefusedError, match="max_tokens is 61; together they fit 100: ask for 60 at most"):
        room(40, 61)
    with pytest.raises(RefusedError, match="the prompt has 100 tokens"):
        room(100, None)
