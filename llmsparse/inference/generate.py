"""Continue a text with a model, dense or packed, and say how fast that was and what memory it took.

Greedy: the same model and prompt give the same text. The first token is timed by itself, since it reads the prompt;
tokens per second are those after it.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TextStreamer

from llmsparse.backends.choice import AUTO
from llmsparse.errors import CheckpointError, LlmsparseError, RecipeError, one_line
from llmsparse.inference import decode
from llmsparse.inference.detokenizer import Detokenizer
from llmsparse.inference.explain import explain
from llmsparse.inference.leaving import on_disk_of
from llmsparse.inference.load import GENERATION, load_model
from llmsparse.inference.on_disk import told
from llmsparse.models.origin import fetch_model, load_tokenizer, read_config
from llmsparse.runs.device import choose_device
from llmsparse.runs.memory import PeakMemory, used_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Generation:
    """A continuation and its cost. Memory is the process's: on a CPU its proportional set size, on a GPU what torch
    has allocated."""

    model: str
    prompt: str
    text: str  # what came after the prompt
    prompt_tokens: int
    new_tokens: int
    device: str
    dtype: str
    threads: int
    backends: dict[str, int]  # backend → packed weights that it runs; empty for a model that runs as it is
    experts: dict[str, int]  # what runs dense experts → how many modules; empty for a model without
    on_disk: dict[str, Any] | None  # of experts that stay there: how many, and what became of those asked for
    load_seconds: float
    first_token_seconds: float
    tokens_per_second: float | None  # None where there is one token
    memory_bytes: int  # after the first token
    peak_memory_bytes: int  # while loading or generating

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One line."""
        runs = ", ".join(f"{name} runs {count} weights" for name, count in self.backends.items()) or "nothing is packed"
        runs += "".join(f", {name} runs {count} modules of experts" for name, count in self.experts.items())
        runs += "" if self.on_disk is None else f"; {told(self.on_disk)}"
        speed = "" if self.tokens_per_second is None else f", then {self.tokens_per_second:.1f} tokens/s"
        return (
            f"{self.new_tokens} tokens: the first after {self.first_token_seconds:.2f} s{speed}; loaded in "
            f"{self.load_seconds:.1f} s; memory {self.memory_bytes / 1e9:.2f} GB, {self._peak()}; "
            f"{self.device}, {self.dtype}, {self.threads} thread{'s' if self.threads > 1 else ''}; {runs}"
        )

    def _peak(self) -> str:
        """On a CPU without what is mapped from files, which `memory_bytes` counts."""
        beside = " beside mapped files" if self.device == "cpu" else ""
        return f"at most {self.peak_memory_bytes / 1e9:.2f} GB{beside}"

    def table(self) -> RenderableType:
        from rich.text import Text

        return Text(self.prompt + self.text)


def generate(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    backend: str = AUTO,
    optimize: str = "memory",
    device: str = "auto",
    dtype: str = "auto",
    experts: str = AUTO,
    expert_memory: str | int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    write: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt` by at most `max_new_tokens` tokens; `write` is given the text piece by piece as it comes, `say` a line
    before it where there is something to say.

    `model` is a folder, a hub id or `builtin`; `backend`, `experts` and `expert_memory` as in `load_model`. Raises a
    LlmsparseError of one line.
    """
    if max_new_tokens < 1:
        raise RecipeError(f"max_new_tokens {max_new_tokens}: wanted 1 or more")
    place, folder = choose_device(device), fetch_model(model, revision)
    with PeakMemory(place) as memory:
        started = time.perf_counter()
        tokenizer = load_tokenizer(folder, trust_remote_code)
        ids = tokenizer(_readable(prompt), return_tensors="pt", verbose=False)["input_ids"]  # (1, tokens)
        _check_length(read_config(folder), ids.shape[1], max_new_tokens)
        loaded = load_model(
            folder,
            backend=backend,
            optimize=optimize,
            device=place,
            dtype=dtype,
            experts=experts,
            expert_memory=expert_memory,
            trust_remote_code=trust_remote_code,
        )
        load_seconds = time.perf_counter() - started
        _check_tokens(ids, loaded)
        on_disk = on_disk_of(loaded)
        if on_disk is not None and say is not None:
            say(on_disk.plan())
        clock = Clock(tokenizer, ids[0].tolist(), place, write)
        with _told_of(folder / GENERATION):
            new = _continue(loaded, tokenizer, ids.to(place), max_new_tokens, clock)
        explained = explain(loaded)
        return Generation(
            model=model,
            prompt=prompt,
            text=clock.text,
            prompt_tokens=ids.shape[1],
            new_tokens=new,
            device=str(place),
            dtype=str(loaded.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            backends=explained.backends,
            experts=explained.experts_run_by,
            on_disk=None if on_disk is None else on_disk.to_json(),
            load_seconds=load_seconds,
            first_token_seconds=clock.times[1] - clock.times[0],
            tokens_per_second=clock.tokens_per_second(),
            memory_bytes=clock.memory_bytes,
            peak_memory_bytes=memory.read(),
        )


def _continue(model: Any, tokenizer: Any, ids: Tensor, new: int, clock: Clock) -> int:
    """Hand at most `new` tokens after `ids` (1, tokens) to the clock as they come; how many they were."""
    if decode.why_not(model) is None:
        clock.put(ids)
        for token in decode.decode(model, ids, new):
            clock.put(torch.tensor([token]))
        clock.end()
        return len(clock.times) - 1
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,  # tokens are handed on as they come
        tokenizer=tokenizer,  # for a generation_config with stop_strings
        streamer=clock,
        logits_processor=[decode.refuse_nan],
        pad_token_id=pad,
    )
    return output.shape[1] - ids.shape[1]


@contextmanager
def _told_of(file: Path) -> Generator[None]:
    """Within it, a setting of the model's that transformers refuses is a CheckpointError that names its file."""
    try:
        yield
    except LlmsparseError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: transformers cannot generate by it: {one_line(error)}") from error


def _check_tokens(ids: Tensor, model: Any) -> None:
    """CheckpointError for a token without a row in the embedding, as a tokenizer has that grew and the model did not."""
    largest, rows = int(ids.max()), int(model.get_input_embeddings().weight.shape[0])
    if largest >= rows:
        raise CheckpointError(
            f"the prompt's token {largest} is none of the model's, which are 0 to {rows - 1}: the tokenizer is another model's"
        )


def _readable(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise RecipeError("the prompt is not UTF-8: give --prompt text that is") from None
    return prompt


class Clock(TextStreamer):
    """Hands the text on as it comes, and notes when each token did."""

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], device: torch.device, write: Callable[[str], None] | None
    ) -> None:
        super().__init__(tokenizer)
        self.times: list[float] = []  # of the start, then of each token
        self.memory_bytes = 0
        self.text = ""  # what came after the prompt
        self._detokenizer, self._device, self._write = Detokenizer(tokenizer, prompt), device, write

    def put(self, value: Tensor) -> None:  # what TextStreamer would do loses blanks
        """The prompt (1, tokens), then token after token (1,)."""
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            return
        if len(self.times) == 2:
            self.memory_bytes = used_bytes(self._device)
            self.times[-1] = time.perf_counter()
        self._hand_on(self._detokenizer.take(value.tolist()))

    def end(self) -> None:
        """No token comes any more."""
        self._hand_on(self._detokenizer.end())

    def _hand_on(self, piece: str) -> None:
        self.text += piece
        if piece and self._write is not None:
            self._write(piece)

    def tokens_per_second(self) -> float | None:
        """After the first token."""
        tokens = len(self.times) - 2
        return tokens / (self.times[-1] - self.times[1]) if tokens > 0 else None


def _check_length(config: dict[str, Any], prompt_tokens: int, max_new_tokens: int) -> None:
    """RecipeError for a prompt without tokens, or one that leaves no room in the model's positions."""
    if prompt_tokens == 0:
        raise RecipeError("the prompt has no tokens: give --prompt some text")
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and prompt_tokens + max_new_tokens > longest:
        raise RecipeError(
            f"the prompt's {prompt_tokens} tokens and {max_new_tokens} new ones are more than the model's {longest} "
            "positions; shorten the prompt or lower --max-new-tokens"
        )
