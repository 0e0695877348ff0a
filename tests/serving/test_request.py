"""What may be asked, field by field."""

from __future__ import annotations

from typing import Any

import pytest

from llmsparse.inference.sampling import Sampling
from llmsparse.serving.refusal import RefusedError, shown
from llmsparse.serving.request import CHAT, COMPLETION, Asked, read

NAMES = frozenset({"m", "./m"})
MESSAGES = [{"role": "user", "content": "x"}]


def asked(path: str = COMPLETION, **body: Any) -> Asked:
    return read(path, body, NAMES, "m")


def chat(**body: Any) -> Asked:
    return asked(CHAT, **{"messages": MESSAGES, **body})


def test_what_is_not_said_is_left_to_the_model() -> None:
    plain = asked(prompt="x")
    assert plain.sampling == Sampling() and plain.new is None and plain.choices == 1
    assert not (plain.stop or plain.echo or plain.stream or plain.usage) and plain.logprobs is None
    assert asked(prompt="x", temperature=None, stop=None, seed=None, n=None, model=None) == plain


def test_a_chat_may_call_its_limit_by_either_name() -> None:
    assert chat(max_completion_tokens=7).new == chat(max_tokens=7).new == 7
    assert chat(max_completion_tokens=7, max_tokens=9).new == 7


def test_the_model_answers_to_each_of_its_names() -> None:
    assert asked(prompt="x", model="m") == asked(prompt="x", model="./m")
    for name in ("gpt-9", "", 5, ["m"]):
        with pytest.raises(RefusedError, match="is not served here; this server has 'm'") as refused:
            asked(prompt="x", model=name)
        assert refused.value.status == 404


def test_each_way_of_sampling_is_taken_as_a_number() -> None:
    got = asked(prompt="x", temperature=1, top_p=0.5, top_k=7, min_p=0.1, repetition_penalty=1.5, seed=-5).sampling
    assert got == Sampling(1.0, 0.5, 7, 0.1, 1.5, seed=-5)
    assert asked(prompt="x", top_k=-1).sampling.top_k == asked(prompt="x", top_k=0).sampling.top_k == 0
    assert asked(prompt="x", presence_penalty=-2, frequency_penalty=2).sampling == Sampling(
        presence_penalty=-2.0, frequency_penalty=2.0
    )


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": 3},
        {"temperature": -1e-9},
        {"temperature": float("nan")},
        {"temperature": 10**400},
        {"top_p": "1"},
        {"top_p": True},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-300},
        {"presence_penalty": 2.1},
        {"seed": 1.0},
        {"seed": 2**64},
        {"seed": False},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"max_tokens": -1},
        {"n": 0},
        {"n": 129},
        {"best_of": 0},
        {"best_of": 2},
        {"logprobs": 21},
        {"logprobs": -1},
        {"logprobs": True},
        {"stream": 1},
        {"echo": "yes"},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [1]},
        {"stop": {}},
        {"stop": "x" * 1025},
        {"stop": ["x"] * 65},
    ],
    ids=lambda field: str(field)[:40],
)
def test_what_is_out_of_range_is_refused_by_its_name(field: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=f"^{next(iter(field))}: (got|wanted)") as refused:
        asked(prompt="x", **field)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "field",
    [
        {"suffix": "x"},
        {"logit_bias": {"5": 1}},
        {"response_format": {"type": "json_object"}},
        {"anything": 0},
        {"anything": False},
        {"tools": [{}]},
    ],
    ids=str,
)
def test_a_field_that_cannot_be_honoured_is_refused_whatever_its_value(field: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=f"{next(iter(field))}: not supported"):
        asked(prompt="x", **field)


@pytest.mark.parametrize(
    "field",
    [
        {"n": 1},
        {"best_of": 1},
        {"logprobs": False},
        {"stop": []},
        {"user": "me"},
        {"anything": None},
        {"suffix": ""},
        {"logit_bias": {}},
        {"response_format": {"type": "text"}},
        {"stream_options": {"include_usage": True}},
    ],
    ids=str,
)
def test_a_field_that_asks_for_nothing_is_let_through(field: dict[str, Any]) -> None:
    assert asked(prompt="x", **field) == asked(prompt="x")


def test_log_probabilities_are_asked_in_each_paths_own_way() -> None:
    assert [asked(prompt="x", logprobs=number).logprobs for number in (None, 0, 5)] == [None, 0, 5]
    assert chat(logprobs=True).logprobs == 0 and chat(logprobs=True, top_logprobs=3).logprobs == 3
    assert chat(logprobs=False).logprobs is None and chat(top_logprobs=0).logprobs is None
    with pytest.raises(RefusedError, match="without logprobs"):
        chat(top_logprobs=3)
    with pytest.raises(RefusedError, match="logprobs: got 1"):
        chat(logprobs=1)


def test_usage_in_a_stream_is_asked_for() -> None:
    assert asked(prompt="x", stream=True, stream_options={"include_usage": True}).usage
    assert not asked(prompt="x", stream=True).usage
    with pytest.raises(RefusedError, match="include_everything: not supported"):
        asked(prompt="x", stream=True, stream_options={"include_everything": True})


def test_tools_are_taken_unless_the_choice_is_none() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tools=tools).tools == chat(tools=tools, tool_choice="auto").tools == tools
    assert chat(tools=tools, tool_choice="none").tools is None and chat(tools=[]).tools is None
    for choice in ("required", {"type": "function"}, 0):
        with pytest.raises(RefusedError, match="tool_choice: got"):
            chat(tools=tools, tool_choice=choice)
    with pytest.raises(RefusedError, match="tools: wanted a list of objects"):
        chat(tools=["f"])


def test_messages_become_texts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts, "type": "text"}]).messages == [
        {"role": "user", "content": "a b"}
    ]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    (message,) = chat(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}]).messages
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}} and message["content"] == ""


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "each with a role"),
        ([], "each with a role"),
        ("x", "each with a role"),
        ([{"content": "x"}], "each with a role"),
        ([{"role": 5, "content": "x"}], "each with a role"),
        ([{"role": "user", "content": 5}], "only text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}], "only text"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "only text"),
        ([{"role": "assistant", "tool_calls": 5}], "tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "tool_calls"),
    ],
    ids=str,
)
def test_messages_that_cannot_be_read_are_refused(messages: Any, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        chat(messages=messages)


@pytest.mark.parametrize("body", [None, [], "x", 5], ids=str)
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    with pytest.raises(RefusedError, match="no JSON object"):
        read(COMPLETION, body, NAMES, "m")


def test_what_was_sent_is_told_back_in_short() -> None:
    for value in ("x" * 10**6, 10**4000, [[[["x" * 500] * 50] * 50] * 50] * 50, {"k" * 500: 1}):
        assert len(shown(value)) <= 120
    assert shown(5) == "5" and shown("a") == "'a'"
