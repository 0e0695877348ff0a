"""Whose template is run, and what a request may set of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmsparse.serving import template as rendering
from llmsparse.serving.refusal import RefusedError
from llmsparse.serving.request import CHAT, read
from llmsparse.serving.template import ChatTemplate

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}{% if loud %}!{% endif %}{{ bos_token }}"


def chat_template(folder: Path, text: Any) -> ChatTemplate:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer, "m")


def rendered(template: ChatTemplate, **body: Any) -> str:
    messages = [{"role": "user", "content": "hi"}]
    return template.render(read(CHAT, {"messages": messages, **body}, frozenset({"m"}), "m"))


def test_a_request_sets_what_the_template_reads(tokenizer_folder: Path) -> None:
    template = chat_template(tokenizer_folder, PLAIN)
    assert template.options == {"loud"}, "not its loop's variable, nor the tokenizer's own"
    assert rendered(template) == "hi<s>"
    assert rendered(template, chat_template_kwargs={"loud": True}) == "hi!<s>"


@pytest.mark.parametrize(
    "key",
    [
        "chat_template",
        "tokenize",
        "return_tensors",
        "truncation",
        "max_length",
        "padding",
        "continue_final_message",
        "add_generation_prompt",
        "messages",
        "conversation",
        "tools",
        "bos_token",
        "tokenizer_kwargs",
        "m",
        "nothing",
    ],
)
def test_nothing_else_is_passed_on(tokenizer_folder: Path, key: str) -> None:
    template = chat_template(tokenizer_folder, PLAIN + "{{ chat_template }}{{ max_length }}{{ messages[0].role }}")
    with pytest.raises(RefusedError, match=f"'{key}' is no option of the template; it reads loud$"):
        rendered(template, chat_template_kwargs={key: "{% for i in range(10) %}x{% endfor %}"})


@pytest.mark.parametrize("value", ["x" * 5000, 10**9, [1], {"a": 1}], ids=lambda value: str(value)[:9])
def test_an_option_is_a_plain_value(tokenizer_folder: Path, value: Any) -> None:
    template = chat_template(tokenizer_folder, PLAIN)
    with pytest.raises(RefusedError, match="loud: got"):
        rendered(template, chat_template_kwargs={"loud": value})


def test_an_options_text_is_text_and_no_template(tokenizer_folder: Path) -> None:
    template = chat_template(tokenizer_folder, "{{ messages[0].content }}{{ system }}")
    assert rendered(template, chat_template_kwargs={"system": "{{ 1 + 1 }}"}) == "hi{{ 1 + 1 }}"


def test_tools_need_a_template_that_knows_them(tokenizer_folder: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    with pytest.raises(RefusedError, match="knows no tools"):
        rendered(chat_template(tokenizer_folder, PLAIN), tools=tools)
    assert rendered(chat_template(tokenizer_folder, PLAIN), tools=tools, tool_choice="none") == "hi<s>"
    knows = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[0].content }}"
    assert rendered(chat_template(tokenizer_folder, knows), tools=tools) == "weather hi"
    by_name = {"default": PLAIN, "tool_use": knows}
    assert rendered(chat_template(tokenizer_folder, by_name), tools=tools) == "weather hi"
    assert rendered(chat_template(tokenizer_folder, by_name)) == "hi<s>"


def test_a_template_that_takes_too_long_is_given_up(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.1)
    slow = "{% for i in range(50000) %}{% for j in range(50000) %}{% endfor %}{% endfor %}x"
    with pytest.raises(RefusedError, match="took longer than"):
        rendered(chat_template(tokenizer_folder, slow))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "cannot take them: roles must alternate"),
        ("{{ 1 / 0 }}", r"cannot take them \(ZeroDivisionError\)"),
        ("{{ messages[0].content.nothing.nothing }}", "has no attribute 'nothing'"),
    ],
)
def test_what_a_template_raises_is_the_requests_fault_in_a_line(
    tokenizer_folder: Path, source: str, reason: str
) -> None:
    with pytest.raises(RefusedError, match=reason):
        rendered(chat_template(tokenizer_folder, source))


def test_a_model_without_a_template_says_where_to_go(tokenizer_folder: Path) -> None:
    with pytest.raises(RefusedError, match="'m' has no chat template; use /v1/completions"):
        rendered(chat_template(tokenizer_folder, None))
