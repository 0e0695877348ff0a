"""Requests drawn by chance: mostly nearly right, with something in them that nobody expects."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
PATHS = (COMPLETION, CHAT, "/v1/models", "/v1/models/x", "/health", "/metrics", "/v1/nothing", "/", "/v1//completions")
METHODS = ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "POST")
NUMBERS: tuple[float, ...] = (
    *(0, -0.0, 1, -1, 2, 3, 5, 10, 64, 127, 128, 129, 383, 384, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64),
    *(-(2**31), -(2**63), -(2**63) - 1, 10**40, -(10**300), 0.5, 1.5, 0.1, 1 - 2**-53, 1 + 2**-52),
    *(5e-324, 2.2e-308, 1e-300, 1e-45, 1e-38, 1.2e-38, 1e-37, 1e-8, 1e-5, 9.99e-6, 3.4e38, 1.8e308, -5e-324),
    *(float("inf"), float("-inf"), float("nan")),
)
LETTERS = (
    *(
        "a",
        "def ",
        "\n",
        " ",
        "  ",
        "\t",
        "\x00",
        "\x7f",
        "é",
        "ß",
        "日本",
        "😀",
        "👩‍👩‍👧",
        "\u202e",
        "\ufeff",
        "\ufffd",
        "\uffff",
    ),
    *(
        "\ud800",
        "\udfff",
        "e\u0301",
        "<s>",
        "</s>",
        "<|im_start|>",
        "{{ 1 }}",
        "{% for x in y %}",
        "\\",
        '"',
        "'",
        "../",
    ),
)
FIELDS = (
    *("prompt", "messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p"),
    *(
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "stop",
        "n",
        "best_of",
        "logprobs",
        "echo",
    ),
    *("top_logprobs", "stream", "stream_options", "tools", "tool_choice", "chat_template_kwargs", "response_format"),
    *("logit_bias", "suffix", "user", "functions", "ignore_eos", "", "prompt\x00", "__class__"),
)
ROLES = ("user", "assistant", "system", "tool", "", "\ud800", None, 5)


@dataclass(frozen=True)
class Drawn:
    """One request."""

    method: str
    path: str
    body: bytes


class Draw:
    """Draws requests, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def request(self) -> Drawn:
        chance = self._random.random()
        path = COMPLETION if chance < 0.5 else CHAT if chance < 0.9 else self._one(PATHS)
        method = "POST" if chance < 0.95 else self._one(METHODS)
        return Drawn(method, path, self._body(path))

    def _one(self, things: tuple[Any, ...]) -> Any:
        return self._random.choice(things)

    def _often(self, chance: float) -> bool:
        return self._random.random() < chance

    def _body(self, path: str) -> bytes:
        body: Any = self._right(path)
        for _ in range(self._random.choice((0, 1, 1, 1, 2, 3, 6))):
            body[self._one(FIELDS)] = self._value(3)
        if self._often(0.02):
            body = self._value(4)
        text = json.dumps(body, ensure_ascii=self._often(0.5)).encode(errors="surrogatepass")
        return self._spoiled(text) if self._often(0.1) else text

    def _right(self, path: str) -> dict[str, Any]:
        """What would be answered, cheaply."""
        body: dict[str, Any] = {"max_tokens": self._random.randint(1, 3)}
        if path == CHAT:
            return body | {"messages": [{"role": "user", "content": self._text()} for _ in range(self._size(3) or 1)]}
        kinds = (self._text, self._ids, lambda: [self._text(), self._text()], lambda: [self._ids(), self._ids()])
        return body | {"prompt": self._random.choice(kinds)()}

    def _value(self, depth: int) -> Any:
        kind = self._random.randrange(9 if depth else 6)
        if kind < 3:
            return self._one(NUMBERS) if self._often(0.8) else self._random.uniform(-3, 3)
        if kind < 5:
            return self._text()
        if kind == 5:
            return self._one((None, True, False, [], {}, "", "auto", "none"))
        if kind == 6:
            return [self._value(depth - 1) for _ in range(self._size(5))]
        if kind == 7:
            return {self._one(FIELDS) if self._often(0.5) else self._text(): self._value(depth - 1) for _ in range(3)}
        return self._odd_part()

    def _odd_part(self) -> Any:
        """Something of a chat's form, or nearly."""
        function = {"name": self._text(), "arguments": self._one(("{}", "{", "[1]", {"x": 1}, 5, None))}
        message: dict[str, Any] = {
            "role": self._one(ROLES),
            "content": self._one(("x", None, [], 5, [{"type": "text"}])),
        }
        if self._often(0.3):
            message["tool_calls"] = self._one(([{"function": function}], [function], 5, {}, [None]))
        return self._one(
            (
                [message],
                [{"type": "function", "function": function}],
                {"include_usage": self._one((True, False, None, 1))},
                {self._one(("loud", "chat_template", "tokenize", "return_tensors", "max_length")): self._value(0)},
                self._ids(),
            )
        )

    def _ids(self) -> list[Any]:
        odd = self._one(NUMBERS) if self._often(0.1) else 5
        return [self._random.randint(2, 383) for _ in range(self._size(8))] + [odd]

    def _text(self) -> str:
        return "".join(self._one(LETTERS) for _ in range(self._size(6)))

    def _size(self, usual: int) -> int:
        """Mostly small, sometimes thousands."""
        if self._often(0.003):
            return self._random.choice((100, 1000, 5000))
        return self._random.randrange(usual + 1)

    def _spoiled(self, text: bytes) -> bytes:
        at = self._random.randrange(len(text) + 1)
        how = self._random.randrange(5)
        if how == 0:
            return text[:at]
        if how == 1:
            return text[:at] + self._random.randbytes(self._random.randrange(1, 9)) + text[at:]
        if how == 2:
            return self._random.randbytes(at)
        if how == 3:
            return text + text
        return b"[" * self._one((1, 50, 2000)) + text
