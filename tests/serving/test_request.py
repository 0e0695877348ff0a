from __future__ import annotations

from typing import Any

import pytest

from llmsparse.serving.request import CHAT, COMPLETION, GREEDY, NEW_TOKENS, RefusedError, Served, checked


def served(context: int = 100, sampling: dict[str, Any] | None = None) -> Served:
    return Served("m", context, 50, lambda body: len(body["messages"]), len, True, sampling or {})


def test_an_answer_has_room_for_what_was_asked_or_for_what_is_left() -> None:
    assert checked(COMPLETION, {"prompt": "x" * 40, "max_tokens": 60}, served()).body["max_tokens"] == 60
    assert checked(COMPLETION, {"prompt": "x" * 40}, served()).body["max_tokens"] == 60
    assert checked(COMPLETION, {"prompt": "x"}, served(10**6)).body["max_tokens"] == NEW_TOKENS
    with pytest.raises(RefusedError, match="ask for 60 at most"):
        checked(COMPLETION, {"prompt": "x" * 40, "max_tokens": 61}, served())
    with pytest.raises(RefusedError, match="100 tokens; prompt and answer together fit 100"):
        checked(COMPLETION, {"prompt": "x" * 100}, served())


def test_a_chat_may_call_its_limit_by_either_name() -> None:
    messages = [{"role": "user", "content": "x"}]
    body = checked(CHAT, {"messages": messages, "max_completion_tokens": 7}, served()).body
    assert body == {"messages": messages, "model": "m", "max_tokens": 7}


def test_sampling_is_asked_for_or_the_models_own_or_greedy() -> None:
    own = {"temperature": 0.6, "top_p": 0.9, "top_k": 80}

    def sampling(asked: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        return checked(COMPLETION, {"prompt": "x", **asked}, served(sampling=own)).sampling

    assert sampling({}, {}) == {"temperature": GREEDY, "top_p": 1.0}
    assert sampling({}, own) == {"temperature": 0.6, "top_p": 0.9, "top_k": 50}  # the vocabulary has no more
    assert sampling({"temperature": 0, "top_p": 0.5}, own) == {"temperature": GREEDY, "top_p": 1.0, "top_k": 1}
    assert sampling({"temperature": 1, "top_p": 0.5}, {}) == {"temperature": 1.0, "top_p": 0.5}


@pytest.mark.parametrize(
    "field", [{"n": 2}, {"logprobs": True}, {"seed": 1}, {"stop": "x"}, {"anything": [1]}], ids=str
)
def test_a_field_that_would_change_the_answer_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=f"{next(iter(field))}: not supported"):
        checked(COMPLETION, {"prompt": "x", **field}, served())


@pytest.mark.parametrize(
    "field",
    [{"n": 1}, {"logprobs": False}, {"stop": None}, {"user": "me"}, {"stream_options": {"include_usage": True}}],
    ids=str,
)
def test_a_field_that_asks_for_nothing_is_let_through(field: dict[str, Any]) -> None:
    assert checked(COMPLETION, {"prompt": "x", **field}, served()).body == {
        "prompt": "x",
        "model": "m",
        "max_tokens": 99,
    }


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": 3},
        {"temperature": float("nan")},
        {"top_p": "1"},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"stream": 1},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=f"{next(iter(field))}: got"):
        checked(COMPLETION, {"prompt": "x", **field}, served())


def test_pictures_are_refused_rather_than_left_out() -> None:
    content = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(RefusedError, match="only text"):
        checked(CHAT, {"messages": [{"role": "user", "content": content}]}, served())
