"""How a command ends: 0 done, 1 the run failed, 2 usage or input, 3 the machine, 130 interrupted.

An error is one line on stderr; --debug shows the traceback before it. What is no mistake of the user's or the machine's
is a bug, and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import typer

from llmsparse.cli.terminal import Terminal
from llmsparse.errors import LlmsparseError

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # any wrong flag or argument; typer does not export the class
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # disk full, no permission
OUT_OF_CPU_MEMORY = ("can't allocate memory", "not enough memory")  # torch has no class of error for it
INTERRUPTED = 130


def exit_code_of(run: Callable[[], None], terminal: Terminal) -> int:
    """Run a command to its end, good or bad."""
    try:
        with _sigterm_interrupts(), warnings.catch_warnings():
            run()
            sys.stdout.flush()
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:  # whoever reads stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        hint = terminal.how_to_resume()
        return _fail(terminal, INTERRUPTED, f"interrupted{'; ' + hint if hint else ''}", common=True)
    except LlmsparseError as error:
        return _fail(terminal, error.exit_code, str(error), error.common)
    except USAGE_ERROR as error:
        command = error.ctx.command_path if error.ctx else "llmsparse"
        return _fail(terminal, 2, f"{error.format_message()} ({command} --help)", common=terminal.place.local_rank > 0)
    except MemoryError:
        return _fail(terminal, 3, _out_of("memory", terminal))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _fail(terminal, 2, f"{error.filename}: {error.strerror}")
        if error.errno == errno.ENOENT and error.filename is None:  # os.getcwd
            return _fail(terminal, 3, "the current folder is no longer there; change to another")
        if error.errno not in MACHINE:
            raise
        hint = terminal.how_to_resume()
        what = error.filename or "a file or standard output"
        return _fail(terminal, 3, f"{what}: {error.strerror}; make room or give leave{'; ' + hint if hint else ''}")
    except RuntimeError as error:
        if _is_out_of_gpu_memory(error):
            return _fail(terminal, 3, _out_of("GPU memory", terminal))
        if "can't start new thread" in str(error):
            return _fail(
                terminal, 3, "no further thread may be started here; raise the limit (ulimit -u), or end others"
            )
        if not any(words in str(error) for words in OUT_OF_CPU_MEMORY):
            raise
        return _fail(terminal, 3, _out_of("memory", terminal))
    return 0


def _fail(terminal: Terminal, status: int, line: str, common: bool = False) -> int:
    """One line. What is `common` to all processes of a run the first one says; what another ends in alone says who it is."""
    rank = terminal.place.rank
    if rank and common:
        return status
    if terminal.debug:
        traceback.print_exc()
    print(f"error: {f'rank {rank}: ' if rank else ''}{' '.join(line.split())}", file=sys.stderr)
    return status


def _out_of(memory: str, terminal: Terminal) -> str:
    hint = terminal.how_to_resume()
    advice = "start anew with --batch-size 1 or a shorter --seq-len" + (" and --overwrite" if hint else "")
    return f"out of {memory}: {advice}{'; or free some: ' + hint if hint else ''}"


def _is_out_of_gpu_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


@contextmanager
def _sigterm_interrupts() -> Generator[None, None, None]:
    """SIGTERM ends a run as Ctrl-C does: cleanly, resumable."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
