"""Several processes of one run, as torchrun would start them: forks of one that has imported what the verbs need.

`python forked.py` reads a line of JSON for each group and answers with how every process of it ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self


class Death(NamedTuple):
    """A rank, and the file name that it is sent a signal at as it is opened for the so-and-so-many-th time."""

    rank: int
    file: str
    time: int
    signal: int = signal.SIGKILL


class Ended(NamedTuple):
    """How a process ended: its exit code, or the negative number of the signal that ended it, and what it wrote."""

    code: int
    out: str
    err: str


class Forked:
    """The process that forks, as a test sees it; a context manager."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # as `quiet` has it in processes that do not speak
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(self, size: int, *commands: list[str], die: Death | None = None, **environment: str) -> list[Ended]:
        """Each of `size` processes runs these command lines, one after the other, until one fails."""
        return self.run_each([list(commands)] * size, die=die, **environment)

    def run_each(self, commands: list[list[list[str]]], die: Death | None = None, **environment: str) -> list[Ended]:
        """Command lines of each process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"commands": commands, "die": die, "environment": environment}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return [Ended(*one) for one in json.loads(self._process.stdout.readline())]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _child(rank: int, asked: dict[str, Any], folder: Path) -> None:
    from llmsparse.cli.app import main

    for stream in ("stdout", "stderr"):
        number = os.open(folder / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT)
        os.dup2(number, getattr(sys, stream).fileno())
    if asked["die"] and asked["die"][0] == rank:
        from warm_process import die_at

        die_at(*asked["die"][1:])
    code = 0
    for command in asked["commands"][rank]:
        code = code or main(command)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    sys.path.append(str(Path(__file__).parents[1] / "runs"))
    import llmsparse.pruning.pipeline  # noqa: F401
    from llmsparse.demo import run as _  # noqa: F401

    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        size = len(asked["commands"])
        shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": free_port()} | asked["environment"]
        with tempfile.TemporaryDirectory() as name:
            children: list[int] = []
            for rank in range(size):
                pid = os.fork()
                if pid == 0:
                    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared)
                    try:
                        _child(rank, asked, Path(name))
                    except BaseException:  # a bug's traceback; the folder is the parent's
                        traceback.print_exc()
                        os._exit(70)
                children.append(pid)
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
            said = [[(Path(name) / f"{n}.{kind}").read_text() for kind in ("stdout", "stderr")] for n in range(size)]
        print(json.dumps([[code, *texts] for code, texts in zip(codes, said, strict=True)]), flush=True)


if __name__ == "__main__":
    _serve()
