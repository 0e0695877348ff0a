"""Serve a model, dense, pruned or packed, as OpenAI's API.

transformers' own server runs in this process, where packed checkpoints load, with continuous batching; `gate.py` stands
before it. transformers documents its command, not its parts: all that is touched of them is in `TransformersServer`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from llmsparse.backends.choice import AUTO, check_names
from llmsparse.errors import MachineError, RecipeError
from llmsparse.inference.load import load_model
from llmsparse.models.origin import fetch_model, load_tokenizer
from llmsparse.runs.device import choose_device
from llmsparse.runs.memory import available_bytes
from llmsparse.serving.middleware import Gate
from llmsparse.serving.request import Served

EXTRA = ("fastapi", "uvicorn", "openai")
LOOPBACK = ("127.", "::1")
GRACE_SECONDS = 10  # to hang up on clients, once generation has stopped
PAGE = 256  # tokens of keys and values that are kept together
CPU_TOKENS = 16384


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    backend: str = AUTO,
    device: str = "auto",
    dtype: str = "auto",
    experts: str = AUTO,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_tokens: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve `model` (folder, hub id or `builtin`) until SIGTERM or Ctrl-C; port 0 takes a free one.

    `cache_tokens`: keys and values that are held at once, of all requests together, and so the longest conversation; by
    default what fits a GPU, and 16384 on a CPU. `say` gets the address once requests are answered. Raises MachineError
    without the extra `serve` or where the port is taken, else what loading the model raises.
    """
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise MachineError(f"serving needs {', '.join(missing)}: pip install 'llmsparse[serve]'")
    check_names(backend, "memory")
    place, folder = choose_device(device), fetch_model(model, revision)
    bound = _bind(host, port)  # before the model is read: a port in use shows at once
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code)
        loaded = load_model(
            folder,
            backend=backend,
            device=place,
            dtype=dtype,
            experts=experts,
            trust_remote_code=trust_remote_code,
        )
        engine = TransformersServer(model, loaded, tokenizer, cache_tokens)
        address = bound.getsockname()

        def ready() -> None:
            if api_key is None and not address[0].startswith(LOOPBACK):
                say(f"no --api-key: whoever reaches port {address[1]} of this machine can use the model")
            shown = f"[{address[0]}]" if ":" in address[0] else address[0]
            tokens = engine.served.context
            say(f"serving {model} at http://{shown}:{address[1]}/v1, conversations of up to {tokens} tokens")

        try:
            engine.start()
            engine.run(Gate(engine, api_key), bound, ready)
        finally:
            engine.stop()
            engine.batching.join(time.perf_counter())
    finally:
        bound.close()


class TransformersServer:
    """transformers' server with a model that is loaded already, in which each request samples as it asks.

    Left alone, it would run all requests with the sampling of the first.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, cache_tokens: int | None = None) -> None:
        from transformers import ContinuousBatchingConfig
        from transformers.cli.serve import Serve
        from transformers.cli.serving.model_manager import TimedModel
        from transformers.utils import logging

        class Held(Serve):
            def start_server(self) -> None:
                """`run` does, behind the gate."""

        level = logging.get_verbosity()
        held = Held(non_blocking=True, continuous_batching=True, log_level="error")
        logging.set_verbosity(level)
        manager: Any = held._model_manager
        manager.force_model = name
        manager.process_model_name = str  # answers name the model without a revision
        manager.loaded_models[name] = TimedModel(model, timeout_seconds=-1, processor=tokenizer)

        self.batching: Any = model.init_continuous_batching(
            generation_config=_shared(model.generation_config),
            continuous_batching_config=ContinuousBatchingConfig(
                per_request_processors=True,
                auto_switch_to_flash=find_spec("flash_attn") is not None,  # else it would ask the hub for kernels
                **_cache(model, cache_tokens),
            ),
        )
        batches: Any = held._generation_state.get_manager(name, use_cb=True)
        batches._cb = self.batching  # it would make one for the first request
        self._sampling: dict[str, dict[str, Any]] = {}
        self._sample_as_asked()
        self.app: Any = held.server.config.app
        self.app.add_exception_handler(RuntimeError, _failed)
        self._tokenizer = tokenizer
        self._messages: Any = partial(
            held._chat_handler.get_processor_inputs_from_messages,
            modality=manager.get_model_modality(model, tokenizer),
        )
        config, own = model.config.get_text_config(), model.generation_config
        sampling = {key: getattr(own, key) for key in ("temperature", "top_p", "top_k")} if own.do_sample else {}
        self.served = Served(
            name=name,
            context=getattr(config, "max_position_embeddings", None) or sys.maxsize,
            vocabulary=config.vocab_size,
            count_chat=self._count_chat,
            count_text=lambda text: len(tokenizer(text)["input_ids"]),
            chat=bool(getattr(tokenizer, "chat_template", None)),
            sampling={key: value for key, value in sampling.items() if value is not None},
        )

    def start(self) -> None:
        """Begin to generate. MachineError where keys and values find no room."""
        self.batching.start()
        status = self.batching.background_thread_status
        while self.batching.batch_processor is None:
            if status.fatal_error is not None:
                raise MachineError(f"no room for keys and values beside the model: {status.fatal_error}")
            time.sleep(0.01)
        room = int(self.batching.batch_processor.cache.max_tokens_read)
        self.served = replace(self.served, context=min(self.served.context, room))

    @contextmanager
    def sampling(self, request_id: str, values: dict[str, Any]) -> Generator[None, None, None]:
        self._sampling[request_id] = values
        try:
            yield
        finally:
            self._sampling.pop(request_id, None)

    def health(self) -> tuple[str | None, int]:
        error, processor = self.batching.background_thread_status.fatal_error, self.batching.batch_processor
        scheduler = None if processor is None else processor.scheduler
        running = len(scheduler.active_requests) + len(scheduler.waiting_requests) if scheduler else 0
        return None if error is None else f"generation has died: {error}; start the server again", running

    def run(self, app: Any, bound: socket.socket, ready: Callable[[], None]) -> None:
        """Answer on a bound socket until a signal comes; requests that are then running end with an error. `ready` is
        called when the first request may come."""
        import uvicorn

        stop = self.stop

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

        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=GRACE_SECONDS)
        try:
            Server(config).run(sockets=[bound])
        except OSError as error:
            host, port = bound.getsockname()[:2]
            raise _cannot_listen(host, port, error) from error

    def stop(self) -> None:
        """Let generation end after the step that it is at."""
        status = self.batching.background_thread_status
        status.request_stop(status.HARD_STOP, 0)

    def _sample_as_asked(self) -> None:
        add = self.batching.add_request

        def add_request(*arguments: Any, request_id: str, **options: Any) -> Any:
            return add(*arguments, request_id=request_id, **options, **self._sampling.pop(request_id))

        self.batching.add_request = add_request

    def _count_chat(self, body: Mapping[str, Any]) -> int:
        options = body.get("chat_template_kwargs") or {}
        rendered = self._tokenizer.apply_chat_template(
            self._messages(body["messages"]),
            add_generation_prompt=True,
            tools=body.get("tools"),
            return_dict=True,
            **options,
        )
        return len(rendered["input_ids"])


def _shared(own: Any) -> Any:
    """The sampling of all requests, which is not neutral: what is neutral would be left out, and no request could set
    it. A top_k is only there for a model that wants one, since it sorts the vocabulary."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_p=0.5,
        top_k=(own.top_k or 0) if own.do_sample else 0,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )


def _cache(model: Any, tokens: int | None) -> dict[str, Any]:
    """Room for keys and values. Where nobody says how much, transformers sees what fits a GPU; on a CPU it would take
    most of the machine's memory, and gets eight conversations' worth, up to CPU_TOKENS or a fifth of the free memory."""
    on_cpu = model.device.type == "cpu"
    if tokens is None and on_cpu:
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        pairs = config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads)
        affordable = available_bytes(model.device) // 5 // (2 * pairs * width * model.dtype.itemsize)
        tokens = min(8 * getattr(config, "max_position_embeddings", CPU_TOKENS), CPU_TOKENS, affordable)
    room = {} if tokens is None else {"page_size": PAGE, "num_blocks": max(1, -(-tokens // PAGE))}
    return room | ({"max_batch_tokens": 512, "max_requests_per_batch": 64} if on_cpu else {})


async def _failed(request: Any, error: Exception) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"message": str(error), "type": "server_error", "param": None, "code": 503}}, 503)


def _bind(host: str, port: int) -> socket.socket:
    """A socket of its own at that address. RecipeError for a host that is none, MachineError for a port that is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise RecipeError(f"--host {host}: no such address ({error})") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


def _cannot_listen(host: str, port: int, error: OSError) -> MachineError:
    if error.errno == errno.EADDRINUSE:
        return MachineError(f"port {port} of {host} is in use; choose another with --port, or 0 for a free one")
    return MachineError(f"cannot listen on port {port} of {host}: {error.strerror}; choose another --port or --host")
