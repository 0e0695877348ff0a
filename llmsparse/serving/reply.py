"""OpenAI's forms: an answer whole or in chunks, for a chat or a completion, with or without log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmsparse.inference.detokenizer import UNFINISHED
from llmsparse.serving.choice import Piece
from llmsparse.serving.request import CHAT, Asked
from llmsparse.serving.sequence import Scored
from llmsparse.serving.tool_calls import Part

KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def error(status: int, reason: str) -> dict[str, Any]:
    """What every refusal and failure looks like, in a stream too."""
    kind = KINDS.get(status, "invalid_request_error")
    return {"error": {"message": reason, "type": kind, "param": None, "code": status}}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass
class Reply:
    """The form of the answers to one request; `token_text` is a token's own text."""

    asked: Asked
    model: str
    identity: str
    token_text: Callable[[int], str]
    created: int = field(default_factory=lambda: int(time.time()))
    calls: dict[int, int] = field(default_factory=dict[int, int])  # index of a choice → calls of tools so far
    offsets: dict[int, int] = field(default_factory=dict[int, int])  # index of a choice → characters so far

    @property
    def chat(self) -> bool:
        return self.asked.path == CHAT

    def whole(self, pieces: dict[int, Piece], used: dict[str, int]) -> dict[str, Any]:
        """All of an answer: the pieces of each choice, joined, by its index."""
        form = self._whole_chat if self.chat else self._whole_completion
        choices = [form(index, piece) for index, piece in pieces.items()]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": used}

    def begin(self, choices: int) -> list[dict[str, Any]]:
        """The chunks that say who speaks; a completion has none."""
        start = {"role": "assistant", "content": ""}
        return [self._chunk(index, {"delta": start}, None) for index in range(choices)] if self.chat else []

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What is new of a choice; nothing where that is nothing."""
        scores = self._scores(index, piece.scored)
        if not self.chat:
            new = piece.text or piece.finish or scores
            return [self._chunk(index, {"text": piece.text}, scores, piece.finish)] if new else []
        deltas = [self._delta(index, part) for part in piece.parts]
        if scores and not deltas:
            deltas.append({"content": ""})
        chunks = [self._chunk(index, {"delta": delta}, scores if n == 0 else None) for n, delta in enumerate(deltas)]
        return chunks + ([self._chunk(index, {"delta": {}}, None, piece.finish)] if piece.finish else [])

    def used(self, used: dict[str, int]) -> dict[str, Any]:
        """The chunk that says what a stream has cost, after all others."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": used}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model}

    def _chunk(
        self, index: int, content: dict[str, Any], scores: dict[str, Any] | None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": scores, "finish_reason": finish}
        unused = {"usage": None} if self.asked.usage else {}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [choice], **unused}

    def _whole_completion(self, index: int, piece: Piece) -> dict[str, Any]:
        scores = self._scores(index, piece.scored)
        return {"index": index, "text": piece.text, "logprobs": scores, "finish_reason": piece.finish}

    def _whole_chat(self, index: int, piece: Piece) -> dict[str, Any]:
        calls = [self._call(index, part) for part in piece.parts if part.call]
        message: dict[str, Any] = {"role": "assistant", "content": piece.text}
        thoughts = "".join(part.text for part in piece.parts if part.thought)
        message |= {"reasoning_content": thoughts} if thoughts else {}
        for call in calls:
            del call["index"]  # which says in a stream what belongs together
        message |= {"tool_calls": calls} if calls else {}
        scores = self._scores(index, piece.scored)
        return {"index": index, "message": message, "logprobs": scores, "finish_reason": piece.finish}

    def _delta(self, index: int, part: Part) -> dict[str, Any]:
        if part.call:
            return {"tool_calls": [self._call(index, part)]}
        return {"reasoning_content" if part.thought else "content": part.text}

    def _call(self, index: int, part: Part) -> dict[str, Any]:
        name, arguments = part.call or ("", "")
        number = self.calls.get(index, 0)
        self.calls[index] = number + 1
        identity = f"call_{self.identity.rpartition('-')[2]}_{index}_{number}"
        return {
            "index": number,
            "id": identity,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def _scores(self, index: int, scored: list[Scored]) -> dict[str, Any] | None:
        if self.asked.logprobs is None or not scored:
            return None
        if self.chat:
            return {"content": [self._chat_score(token) for token in scored], "refusal": None}
        texts = [self.token_text(token.token) for token in scored]
        offsets = list[int]()
        for text in texts:
            offsets.append(self.offsets.get(index, 0))
            self.offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in scored],
            "top_logprobs": [self._likeliest(token) for token in scored],
            "text_offset": offsets,
        }

    def _likeliest(self, scored: Scored) -> dict[str, float] | None:
        """Text → log-probability of the likeliest tokens and the one that was taken; of two with one text the likelier."""
        if scored.logprob is None:
            return None
        best: dict[str, float] = {}
        for token, logprob in (*scored.likeliest, (scored.token, scored.logprob)):
            best.setdefault(self.token_text(token), logprob)
        return best

    def _chat_score(self, scored: Scored) -> dict[str, Any]:
        likeliest = [self._token_score(token, logprob) for token, logprob in scored.likeliest]
        return {**self._token_score(scored.token, scored.logprob), "top_logprobs": likeliest}

    def _token_score(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": None if UNFINISHED in text else list(text.encode())}
