"""OpenAI's API over HTTP: who may enter, by which paths, and what every refusal looks like.

    GET  /health                 anyone; 503 once generation has died
    GET  /metrics                anyone; for Prometheus
    GET  /v1/models              the one that is served; /v1/models/NAME too
    POST /v1/chat/completions    and /v1/completions

HEAD and OPTIONS are answered wherever GET or POST is. Web pages of other origins may use it where `serve` was told so.
"""

from __future__ import annotations

import hmac
import json
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from llmsparse.errors import one_line
from llmsparse.serving.answering import Answering, BrokenError, GoneError, Receive, Send, send_json
from llmsparse.serving.metrics import CONTENT_TYPE, Metrics
from llmsparse.serving.model import ServedModel
from llmsparse.serving.refusal import RefusedError
from llmsparse.serving.reply import error
from llmsparse.serving.request import PROMPTS

Message = MutableMapping[str, Any]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HEALTH, METRICS, MODELS = "/health", "/metrics", "/v1/models"
READ, ASK = ("GET", "HEAD", "OPTIONS"), ("POST", "OPTIONS")
METHODS = {HEALTH: READ, METRICS: READ, MODELS: READ, **dict.fromkeys(PROMPTS, ASK)}
OTHER = "other"  # the label of every path that there is not


def build(model: ServedModel, api_key: str | None, origins: Sequence[str]) -> Any:
    """The ASGI application; `origins` are those of web pages that may use it, `*` all."""
    app = Server(model, api_key)
    if not origins:
        return app
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])


class Server:
    """The paths."""

    def __init__(self, model: ServedModel, api_key: str | None) -> None:
        self._model = model
        self._key = api_key.encode() if api_key else None
        self._started = int(time.time())
        self._metrics = Metrics(model.engine.state)
        self._answering = Answering(model, self._metrics)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await _refuse_protocol(scope, receive, send)
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            status = status or message["status"]
            if scope["method"] == "HEAD" and message["type"] == "http.response.body":
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            await self._answer(scope, receive, sending)
        except GoneError:
            self._metrics.abandoned.inc()
        except (RefusedError, BrokenError) as refused:
            await _fail(sending, refused.status, str(refused))
        except Exception as unforeseen:
            print(f"{scope['path']!r}: {type(unforeseen).__name__}: {one_line(unforeseen)}", file=sys.stderr)
            if not status:
                await _fail(sending, 500, f"the server failed ({type(unforeseen).__name__})")
        path = scope["path"] if scope["path"] in METHODS else OTHER
        self._metrics.requests.labels(path, str(status or "gone")).inc()

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        methods = READ if path.startswith(f"{MODELS}/") else METHODS.get(path)
        if method == "OPTIONS" and methods:  # carries no key: a browser asks before it knows one
            allowed = [(b"allow", ", ".join(methods).encode())]
            await send({"type": "http.response.start", "status": 204, "headers": allowed})
            return await send({"type": "http.response.body", "body": b""})
        if path.startswith("/v1/") and self._key is not None and not _has_key(scope, self._key):
            raise RefusedError(401, "wrong or missing API key; send it as `Authorization: Bearer KEY`")
        if not methods:
            raise RefusedError(404, f"there is no such path; there are {', '.join(METHODS)}")
        if method not in methods:
            raise RefusedError(405, f"{path}: takes {' or '.join(methods)}")
        if methods is ASK:
            await self._answering(path, receive, send)
        elif path == METRICS:
            await _send(send, 200, self._metrics.text(), CONTENT_TYPE)
        else:
            status, content = self._health() if path == HEALTH else (200, self._models(path))
            await send_json(send, status, json.dumps(content).encode())

    def _health(self) -> tuple[int, Any]:
        state = self._model.engine.state()
        content = {"status": state.dead or "ok", "running": state.running + state.waiting}
        return 503 if state.dead else 200, content

    def _models(self, path: str) -> Any:
        about = {"id": self._model.name, "object": "model", "created": self._started, "owned_by": "llmsparse"}
        about["context"] = self._model.context
        if path == MODELS:
            return {"object": "list", "data": [about]}
        if path.removeprefix(f"{MODELS}/") not in self._model.names:
            raise RefusedError(404, f"that model is not served here; this server has {self._model.name!r}")
        return about


def _has_key(scope: Message, key: bytes) -> bool:
    scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key)


async def _fail(send: Send, status: int, reason: str) -> None:
    again = [(b"retry-after", b"1")] if status == 429 else []
    await send_json(send, status, json.dumps(error(status, reason)).encode(), *again)


async def _send(send: Send, status: int, body: bytes, kind: str) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse_protocol(scope: Message, receive: Receive, send: Send) -> None:
    """Websockets are refused; of the server's own start and end nothing is to be done."""
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1000})
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
