"""C sources → a loaded library: compiled by the system's compiler at first use, and kept in a cache.

The cache is `$XDG_CACHE_HOME/llmsparse`, by default `~/.cache/llmsparse`. A library's name holds a hash of sources,
flags, compiler and machine, and it is renamed into place, so processes that build at the same time do not disturb each
other. The compiler is `$CC`, else the first of cc, gcc and clang. No OpenMP is linked: see `openmp_runtime`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-std=gnu11", "-fno-strict-aliasing", "-fPIC", "-shared", "-pthread")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS = 300  # a compile takes 2 to 5


class BuildError(Exception):
    """No library; the message is one line that says why."""


def load(source: Path, *included: Path) -> ctypes.CDLL:
    """The library of `source`, which `included` are part of. BuildError where it cannot be built or loaded."""
    compiler = find_compiler()
    library = cache_folder() / library_name(compiler, (source, *included))
    if not library.exists():
        _compile(compiler, source, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library} does not load ({_first_line(str(error))}); delete it to build it again") from None


def find_compiler() -> list[str]:
    """The compiler as the start of a command line."""
    asked = os.environ.get("CC")
    if asked:
        command = shlex.split(asked)
        if not command or shutil.which(command[0]) is None:
            raise BuildError(f"no C compiler: CC={asked} is not on the PATH")
        return command
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C compiler: none of {', '.join(COMPILERS)} is on the PATH; install one or set CC")


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "llmsparse"


def library_name(compiler: list[str], sources: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for part in (*compiler, _version(compiler), *FLAGS, platform.machine()):
        digest.update(part.encode() + b"\0")
    for path in sources:
        digest.update(path.read_bytes() + b"\0")
    return f"{sources[0].stem}-{digest.hexdigest()[:20]}.so"


def openmp_runtime() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded, whatever its wheel calls the file. None where there is none."""
    import torch  # brings its runtime

    own = str(Path(torch.__file__).parent)  # …/torch, of which …/torch.libs is one too
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = dict.fromkeys(re.findall(r"\s(/.*/lib(?:gomp|omp|iomp5)[^/\n]*\.so[^/\n]*)$", mapped, re.MULTILINE))
    for path in sorted(found, key=lambda path: not path.startswith(own)):
        try:
            runtime = ctypes.CDLL(path)
        except OSError:
            continue
        if all(hasattr(runtime, name) for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")):
            return runtime
    return None


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            command = [*compiler, *FLAGS, str(source), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
                raise BuildError(f"{shlex.join(compiler)} failed on {source.name}: {_first_line(errors[0])}")
            os.replace(built, library)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{shlex.join(compiler)} took more than {COMPILE_SECONDS} s on {source.name}") from None
    except OSError as error:
        raise BuildError(f"cache {library.parent} is not writable ({error.strerror}); set XDG_CACHE_HOME") from None


def _version(compiler: list[str]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(compiler)} --version failed: {_first_line(str(error))}") from None
    return done.stdout


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else "no message"
