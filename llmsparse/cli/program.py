"""Run a Python program in this process, in which llmsparse has been imported: what it loads by name may be packed.

A program is the name of a command that a package installs, `python -m MODULE`, `python -c CODE`, `python FILE`, or a
file. Its arguments are its own, and so are its exit code, its signals and its tracebacks.
"""

from __future__ import annotations

import runpy
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from llmsparse.errors import RecipeError

USAGE = "llmsparse run -- lm_eval --model hf …, or llmsparse run -- python script.py …"
PYTHON = ("python", "python3", f"python3.{sys.version_info.minor}")


def run_program(words: Sequence[str]) -> int:
    """Run it to its end and return its exit code. RecipeError for what is no Python program of this environment."""
    if not words:
        raise RecipeError(f"run needs a program: {USAGE}")
    program = _find(words[0], list(words[1:]))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        program()
    except SystemExit as done:
        if done.code is None or isinstance(done.code, int):
            return done.code or 0
        print(done.code, file=sys.stderr)
        return 1
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # it is the program's
        traceback.print_exception(error.with_traceback(trace))
        return 1
    return 0


def _find(name: str, arguments: list[str]) -> Callable[[], object]:
    """What runs the program, with `sys.argv` and `sys.path` as Python would have set them."""
    if Path(name).name in PYTHON or _is_this_python(name):
        if Path(name).name != name and not _is_this_python(name):
            raise RecipeError(f"{name}: another Python than this one, {sys.executable}; write python")
        return _python(arguments)
    command = next(iter(entry_points(group="console_scripts", name=name)), None)
    found = shutil.which(name) or shutil.which(str(Path(sys.executable).parent / name))
    if command is not None:
        return _with([found or name, *arguments], None, lambda: sys.exit(command.load()()))
    if found is None and not Path(name).is_file():
        raise RecipeError(f"{name}: no such program in this environment; {USAGE}")
    file = Path(found or name)
    if not _is_python(file):
        raise RecipeError(f"{file}: no Python program, and only these can be helped; {USAGE}")
    return _script(file, arguments)


def _python(words: list[str]) -> Callable[[], object]:
    """python -m MODULE …, python -c CODE … or python FILE …"""
    what, *rest = words or [""]
    if what in ("-m", "-c") and rest:
        first, *arguments = rest
        if what == "-c":
            space = {"__name__": "__main__", "__builtins__": __builtins__}
            return _with(["-c", *arguments], "", lambda: exec(compile(first, "<string>", "exec"), space))
        return _with([first, *arguments], "", lambda: runpy.run_module(first, run_name="__main__", alter_sys=True))
    if what.startswith("-") or not what:
        raise RecipeError(
            f"python {what}: wanted python FILE, python -m MODULE or python -c CODE; options of Python's own go before: "
            f"python {what or '-X …'} -m llmsparse run -- …"
        )
    if not Path(what).exists():
        raise RecipeError(f"{what}: no such file")
    return _script(Path(what), rest)


def _script(file: Path, arguments: list[str]) -> Callable[[], object]:
    beside = str(file if file.is_dir() else file.resolve().parent)
    return _with([str(file), *arguments], beside, lambda: runpy.run_path(str(file), run_name="__main__"))


def _with(argv: list[str], folder: str | None, program: Callable[[], object]) -> Callable[[], object]:
    """The program, with its words in `sys.argv`, and `folder` where it imports from first."""

    def run() -> object:
        before = sys.argv, [*sys.path]
        sys.argv, sys.path[:0] = argv, [] if folder is None else [folder]
        try:
            return program()
        finally:
            sys.argv, sys.path[:] = before

    return run


def _is_this_python(name: str) -> bool:
    found = shutil.which(name)
    return found is not None and Path(found).resolve() == Path(sys.executable).resolve() and Path(name).name != name


def _is_python(file: Path) -> bool:
    """By its name, or by the interpreter that its first line names."""
    if file.is_dir() or file.suffix in (".py", ".pyz", ".pyw"):
        return True
    try:
        with file.open("rb") as stream:
            first = stream.readline(256)
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror})") from error
    return first.startswith(b"#!") and b"python" in first
