"""One answer as its client sees it: tokens become text, up to a stop string, and parts of a chat."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsparse.inference.detokenizer import Detokenizer
from llmsparse.serving.sequence import Ended, News, Scored
from llmsparse.serving.stop import Stop
from llmsparse.serving.tool_calls import Part, Parts


@dataclass
class Piece:
    """What is new of an answer."""

    parts: list[Part] = field(default_factory=list[Part])
    scored: list[Scored] = field(default_factory=list[Scored])
    finish: str | None = None

    def add(self, later: Piece) -> None:
        self.parts += later.parts
        self.scored += later.scored
        self.finish = later.finish or self.finish

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if not part.thought)


class Choice:
    """Takes what the engine tells of one answer."""

    def __init__(self, index: int, detokenizer: Detokenizer, stop: Stop, parts: Parts | None, scored: bool) -> None:
        self.index = index
        self.tokens = 0
        self.ended = False
        self._detokenizer, self._stop, self._parts, self._scored = detokenizer, stop, parts, scored
        self._called = False  # a tool

    def take(self, news: News) -> Piece:
        """What it adds. After a stop string the answer has ended, whatever the engine still tells."""
        piece = Piece(scored=list(news.scored_prompt))
        if news.token is not None:
            self.tokens += 1
            piece.scored += [news.token] if self._scored else []
            self._say(piece, self._stop.take(self._detokenizer.take([news.token.token])))
        if news.ended is not None and not self._stop.found:
            self._say(piece, self._stop.take(self._detokenizer.end()))
        if news.ended is not None or self._stop.found:
            self._say(piece, self._stop.end())
            piece.parts += self._parts.end() if self._parts else []
            piece.finish = self._finish(piece, news.ended)
            self.ended = True
        return piece

    def _say(self, piece: Piece, text: str) -> None:
        if text:
            piece.parts += self._parts.take(text) if self._parts else [Part(text)]
            self._called = self._called or any(part.call for part in piece.parts)

    def _finish(self, piece: Piece, ended: Ended | None) -> str:
        if self._called or any(part.call for part in piece.parts):
            return "tool_calls"
        return "length" if ended is Ended.LENGTH and not self._stop.found else "stop"
