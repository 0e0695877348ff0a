"""A request that comes over HTTP, from its first byte to its last: read in a thread, answered whole or as a stream.

The event loop only passes things on, so that it can always say how the server is: what takes time is done by a few
threads and by the engine's own. A client that hangs up, whatever it was waiting for, has its answers cancelled.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llmsparse.serving.body import Bodies, parsed
from llmsparse.serving.choice import Piece
from llmsparse.serving.encoding import encoded, event
from llmsparse.serving.engine import QueueFullError
from llmsparse.serving.metrics import Metrics
from llmsparse.serving.model import Prepared, ServedModel
from llmsparse.serving.refusal import RefusedError
from llmsparse.serving.reply import Reply, error, usage
from llmsparse.serving.request import CHAT
from llmsparse.serving.sequence import Ended, News
from llmsparse.serving.tool_calls import Part

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Arrived = asyncio.Queue[tuple[int, News] | None]  # index of a choice and what is new of it; None: the client has gone

READERS = 2  # threads that read requests and write answers
MOST_AT_READERS = 256  # requests there
DONE = b"data: [DONE]\n\n"
STATUS = {Ended.FAILED: 500, Ended.STOPPING: 503}


class BrokenError(Exception):
    """An answer that ended for a reason that is not its client's: HTTP status, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class GoneError(Exception):
    """The client has hung up."""


class Answering:
    """Answers the two paths that take prompts."""

    def __init__(self, model: ServedModel, metrics: Metrics) -> None:
        self._model, self._metrics = model, metrics
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reading")
        self._at_readers = 0
        self._bodies = Bodies()

    async def __call__(self, path: str, receive: Receive, send: Send) -> None:
        """Raises RefusedError, BrokenError or GoneError as long as nothing was sent."""
        began, arrived = time.perf_counter(), Arrived()
        prepared = await self._prepare(path, receive, arrived)
        identity = f"{'chatcmpl' if path == CHAT else 'cmpl'}-{uuid.uuid4().hex}"
        reply = Reply(prepared.asked, self._model.name, identity, self._model.token_text)
        try:
            self._model.engine.submit(prepared.sequences)
        except QueueFullError as full:
            raise RefusedError(429, "too many requests are waiting; try again later") from full
        gone = asyncio.create_task(_watch(receive, arrived))
        try:
            pieces = self._pieces(prepared, arrived, began)
            await (self._stream if prepared.asked.stream else self._whole)(prepared, reply, pieces, send)
        finally:
            gone.cancel()
            self._settle(prepared, began)

    async def _prepare(self, path: str, receive: Receive, arrived: Arrived) -> Prepared:
        loop = asyncio.get_running_loop()

        def tell(index: int, news: News) -> None:  # the engine's thread does
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, (index, news))

        async with self._bodies.read(receive) as body:
            if self._at_readers >= MOST_AT_READERS:
                raise RefusedError(429, "too many requests come at once; try again later")
            return await self._at_reader(lambda: self._model.prepare(path, parsed(body), tell))

    async def _at_reader(self, work: Callable[[], Any]) -> Any:
        self._at_readers += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, work)
        finally:
            self._at_readers -= 1

    async def _pieces(self, prepared: Prepared, arrived: Arrived, began: float) -> AsyncIterator[tuple[int, Piece]]:
        """What is new of each choice, as it comes, until all have ended. Raises BrokenError and GoneError."""
        for choice, echo in zip(prepared.choices, prepared.echoes, strict=True):
            if echo:
                yield choice.index, Piece([Part(echo)])
        first, left = True, len(prepared.choices)
        while left:
            one = await arrived.get()
            if one is None:
                raise GoneError
            index, news = one
            choice = prepared.choices[index]
            if news.ended in STATUS:
                raise BrokenError(STATUS[news.ended], news.reason)
            if choice.ended:  # at a stop string; a token was on its way
                continue
            if first:
                self._metrics.first.observe(time.perf_counter() - began)
            first, piece = False, choice.take(news)
            if choice.ended:
                left -= 1
                self._model.engine.cancel([prepared.sequences[index]] if news.ended is None else [])
            yield index, piece

    async def _whole(
        self, prepared: Prepared, reply: Reply, pieces: AsyncIterator[tuple[int, Piece]], send: Send
    ) -> None:
        joined = {choice.index: Piece() for choice in prepared.choices}
        async for index, piece in pieces:
            joined[index].add(piece)
        answer = await self._at_reader(lambda: encoded(reply.whole(joined, _used(prepared))))
        await send_json(send, 200, answer)

    async def _stream(
        self, prepared: Prepared, reply: Reply, pieces: AsyncIterator[tuple[int, Piece]], send: Send
    ) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def say(*chunks: dict[str, Any]) -> None:
            if chunks:
                text = b"".join(map(event, chunks))
                await send({"type": "http.response.body", "body": text, "more_body": True})

        try:
            await say(*reply.begin(len(prepared.choices)))
            async for index, piece in pieces:
                await say(*reply.chunks(index, piece))
            await say(*([reply.used(_used(prepared))] if prepared.asked.usage else []))
        except BrokenError as broken:
            await say(error(broken.status, str(broken)))
        await send({"type": "http.response.body", "body": DONE})

    def _settle(self, prepared: Prepared, began: float) -> None:
        """Whatever way it ended: nothing of it runs on."""
        choices = zip(prepared.sequences, prepared.choices, strict=True)
        self._model.engine.cancel([sequence for sequence, choice in choices if not choice.ended])
        used = _used(prepared)
        self._metrics.prompt_tokens.inc(used["prompt_tokens"])
        self._metrics.tokens.inc(used["completion_tokens"])
        self._metrics.seconds.observe(time.perf_counter() - began)


async def send_json(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    """A whole answer."""
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


async def _watch(receive: Receive, arrived: Arrived) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    arrived.put_nowait(None)


def _used(prepared: Prepared) -> dict[str, int]:
    return usage(sum(len(prompt.ids) for prompt in prepared.prompts), sum(choice.tokens for choice in prepared.choices))
