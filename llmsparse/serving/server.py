"""Serve a model, dense, pruned or packed, as OpenAI's API."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import gc
import socket
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llmsparse.backends.choice import AUTO, check_names
from llmsparse.errors import MachineError
from llmsparse.inference.leaving import on_disk_of
from llmsparse.inference.load import load_model
from llmsparse.models.origin import fetch_model, load_tokenizer
from llmsparse.runs.device import choose_device
from llmsparse.runs.memory import available_bytes
from llmsparse.serving.listening import allow_many_clients, bind, cannot_listen

EXTRA = ("fastapi", "uvicorn", "openai", "prometheus_client")
LOOPBACK = ("127.", "::1")
GRACE_SECONDS = 10  # to hang up on clients, once generation has stopped
CPU_TOKENS = 16384


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    served_model_name: str | None = None,
    allow_origins: Sequence[str] = (),
    backend: str = AUTO,
    device: str = "auto",
    dtype: str = "auto",
    experts: str = AUTO,
    expert_memory: str | int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_tokens: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve `model` (folder, hub id or `builtin`) until SIGTERM or Ctrl-C; port 0 takes a free one.

    It answers to `served_model_name`, to `model` as typed and to its folder's name, and calls itself by the first of
    these. `allow_origins`: of web pages that may use it, `*` for all. `cache_tokens`: keys and values that are held at
    once, of all requests together, and so the longest conversation; by default what fits a GPU, and 16384 on a CPU.
    `say` gets what the server cannot do, and the address once requests are answered. Raises MachineError without the
    extra `serve` or where the port is taken, else what loading the model raises.
    """
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise MachineError(f"serving needs {', '.join(missing)}: pip install 'llmsparse[serve]'")
    from llmsparse.serving.app import build
    from llmsparse.serving.forward import Forward
    from llmsparse.serving.model import ServedModel

    check_names(backend, "memory")
    place, folder = choose_device(device), fetch_model(model, revision)
    bound = bind(host, port)  # before the model is read: a port in use shows at once
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code)
        loaded: Any = load_model(
            folder,
            backend=backend,
            device=place,
            dtype=dtype,
            experts=experts,
            expert_memory=expert_memory,
            trust_remote_code=trust_remote_code,
        ).eval()
        with torch.inference_mode():
            forward = Forward(loaded)
        names = dict.fromkeys((served_model_name or model, model, _folder_name(model, folder)))
        served = ServedModel(loaded, tokenizer, tuple(names), forward, _room(loaded, forward, cache_tokens))
        on_disk = on_disk_of(loaded)
        if on_disk is not None:
            say(on_disk.plan())
        _say_what_is_not_served(served, forward, say)
        address = bound.getsockname()

        def ready() -> None:
            if api_key is None and not address[0].startswith(LOOPBACK):
                say(f"no --api-key: whoever reaches port {address[1]} of this machine can use the model")
            shown = f"[{address[0]}]" if ":" in address[0] else address[0]
            say(
                f"serving {served.name} at http://{shown}:{address[1]}/v1, conversations of up to {served.context} tokens"
            )

        gc.collect()
        gc.freeze()  # the model is no garbage; to look at it again and again would hold up answers
        allow_many_clients()
        served.engine.start()
        try:
            _run(build(served, api_key, allow_origins), bound, ready, served.engine.stop)
        finally:
            served.engine.stop()
            served.engine.join()
            gc.unfreeze()
    finally:
        bound.close()


def _run(app: Any, bound: socket.socket, ready: Callable[[], None], stop: Callable[[], None]) -> None:
    """Answer on a bound socket until a signal comes; requests that are then running end with an error. `ready` is
    called when the first request may come, `stop` when no more will."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            self.force_exit = self.should_exit  # the second time
            self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            stop()
            await super().shutdown(sockets)

    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=GRACE_SECONDS, ws="none")
    try:
        Server(config).run(sockets=[bound])
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise cannot_listen(host, port, error) from error


def _folder_name(model: str, folder: Path) -> str:
    """./my-model is also my-model; a hub id is what it is."""
    return folder.resolve().name if Path(model).expanduser().is_dir() else model


def _say_what_is_not_served(served: Any, forward: Any, say: Callable[[str], None]) -> None:
    if forward.why_alone:
        say(f"answers take turns, since this model cannot run several together: {forward.why_alone}")
    ignored = served.rules.not_served()
    if ignored:
        say(f"generation_config.json asks for {', '.join(ignored)}, which serve cannot do")


def _room(model: Any, forward: Any, tokens: int | None) -> int:
    """Tokens whose keys and values are held at once. By default three quarters of what is free on a GPU; on a CPU eight
    conversations' worth, up to CPU_TOKENS or a fifth of the free memory."""
    each = max(1, forward.bytes_per_token)
    free = available_bytes(model.device)
    if tokens is not None:
        wanted = tokens
    elif model.device.type == "cpu":
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or CPU_TOKENS
        wanted = max(1, min(8 * context, CPU_TOKENS, free // 5 // each))
    else:
        wanted = max(1, free * 3 // 4 // each)
    if wanted * each > free:
        raise MachineError(
            f"no room for keys and values beside the model: {wanted} tokens take {wanted * each} bytes, and {free} are free"
        )
    return wanted
