"""A process that has imported what the verbs need, and runs each in a child of its own that may be killed: so a start costs
milliseconds, where a new Python takes seconds.

`python warm_process.py` reads a line of JSON for each run and answers with how it ended.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

Kill = float | tuple[str, int]  # after so many seconds; or at a file, the so-and-so-many-th time


class WarmProcess:
    """The process as a test sees it; a context manager."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(self, verb: str, keys: dict[str, Any], kill: Kill | None = None) -> float | None:
        """`llmsparse.verb(**keys)`: the seconds that it took, None where it was killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([verb, keys, kill]), file=self._process.stdin, flush=True)
        status, seconds = json.loads(self._process.stdout.readline())
        assert status in (0, -signal.SIGKILL), f"{verb} ended with exit code {status}"
        return seconds if status == 0 else None


def die_at(name: str, time: int, number: int = signal.SIGKILL) -> None:
    """Kill this process as it opens, or puts in its place, a file of that name for the so-and-so-many-th time; or send it
    another signal."""
    left = time

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        path = args[0] if event == "open" else args[1] if event == "os.rename" else ""
        if isinstance(path, str | os.PathLike) and os.fspath(path).endswith(f"/{name}"):
            left -= 1
            if not left:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def main() -> None:
    import torch
    from transformers import AutoTokenizer, Glm4MoeForCausalLM, LlamaForCausalLM  # noqa: F401

    import llmsparse

    names = ("prune", "factorize", "shrink", "quantize", "activations", "tune", "pack")
    verbs = {name: getattr(llmsparse, name) for name in names}
    torch.set_num_threads(1)
    torch.autograd.set_multithreading_enabled(False)
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        verb, keys, kill = json.loads(line)
        kill_after = kill if isinstance(kill, float) else None
        started = time.perf_counter()
        child = os.fork()
        if not child:
            if isinstance(kill, list):
                die_at(*kill)
            verbs[verb](**keys)
            os._exit(0)
        ended = os.pidfd_open(child)
        if not select.select([ended], [], [], kill_after)[0]:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(ended)
        os.write(
            answers, json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - started]).encode() + b"\n"
        )
    os._exit(0)  # an orderly end of everything that was imported takes seconds


if __name__ == "__main__":
    main()
