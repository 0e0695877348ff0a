"""What stands in front of transformers' server: who may enter, by which paths, and with which requests.

    GET  /health                 anyone; 503 once generation has died
    GET  /v1/models              the one that is served
    POST /v1/chat/completions    and /v1/completions, checked by api_request.py

Everything else that transformers' server offers, such as loading another model, is not found. Errors have OpenAI's
form, and an exception behind the gate is an answer of its own, never a traceback.
"""

from __future__ import annotations

import hmac
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from llmsparse.serving.request import PROMPTS, RefusedError, Served, checked

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HEALTH, MODELS = "/health", "/v1/models"
METHODS = {HEALTH: "GET", MODELS: "GET", **dict.fromkeys(PROMPTS, "POST")}
MOST_BYTES = 16 * 2**20  # of a request's body
KINDS = {401: "authentication_error", 500: "server_error", 503: "server_error"}  # any other: invalid_request_error


class Engine(Protocol):
    """What the gate wants of the server behind it."""

    app: App
    served: Served

    def sampling(self, request_id: str, values: dict[str, Any]) -> AbstractContextManager[None]:
        """Within, the request that comes under this id samples so."""
        ...

    def health(self) -> tuple[str | None, int]:
        """Why no request can be answered, or None; and how many are being answered."""
        ...


class Gate:
    """An ASGI application before another one."""

    def __init__(self, engine: Engine, api_key: str | None) -> None:
        self.engine = engine
        self.key = api_key.encode() if api_key else None
        self.started = int(time.time())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.engine.app(scope, receive, send)
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._answer(scope, receive, sending)
        except RefusedError as refused:
            await _reply(sending, refused.status, _error(refused.status, str(refused)))
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            status = 503 if self.engine.health()[0] else 500
            print(f"{scope['path']}: {reason}", file=sys.stderr)
            if not begun:
                await _reply(sending, status, _error(status, reason))

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path.startswith("/v1/") and self.key is not None and not _has_key(scope, self.key):
            raise RefusedError(401, "wrong or missing API key; send it as `Authorization: Bearer KEY`")
        if path not in METHODS:
            raise RefusedError(404, f"{path}: no such path; there are {', '.join(METHODS)}")
        if method != METHODS[path]:
            raise RefusedError(405, f"{path}: takes {METHODS[path]}, not {method}")
        dead, running = self.engine.health()
        if path == HEALTH:
            status = 503 if dead else 200
            return await _reply(send, status, {"status": dead or "ok", "running": running})
        served = self.engine.served
        if path == MODELS:
            about = {"id": served.name, "object": "model", "created": self.started, "owned_by": "llmsparse"}
            return await _reply(send, 200, {"object": "list", "data": [{**about, "context": served.context}]})
        request = checked(path, _parsed(await _body(receive)), served)
        if dead:
            raise RefusedError(503, dead)
        request_id = str(uuid.uuid4())  # our own: two requests under one id would get each other's tokens
        content = json.dumps(request.body).encode()
        replaced = {b"content-length": str(len(content)).encode(), b"x-request-id": request_id.encode()}
        replaced[b"content-type"] = b"application/json"
        headers = [(name, value) for name, value in scope["headers"] if name not in replaced]
        with self.engine.sampling(request_id, request.sampling):
            await self.engine.app({**scope, "headers": [*headers, *replaced.items()]}, _once(content, receive), send)


def _has_key(scope: Message, key: bytes) -> bool:
    given = dict(scope["headers"]).get(b"authorization", b"")
    return hmac.compare_digest(given, b"Bearer " + key)


async def _body(receive: Receive) -> bytes:
    parts = bytearray()
    while True:
        message = await receive()
        parts += message.get("body", b"")
        if len(parts) > MOST_BYTES:
            raise RefusedError(413, f"the body is larger than {MOST_BYTES >> 20} MiB")
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return bytes(parts)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {error}") from error


def _once(content: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `content`, and then what comes from the client, which is that it has gone."""
    given = False

    async def receiving() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return receiving


def _error(status: int, reason: str) -> dict[str, Any]:
    kind = KINDS.get(status, "invalid_request_error")
    return {"error": {"message": reason, "type": kind, "param": None, "code": status}}


async def _reply(send: Send, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
