"""The library is built once, by whoever comes first, or the reason is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmsparse.backends.cpu import build
from llmsparse.backends.cpu.library import LIBRARY

LOAD = f"""
import runpy, sys
from pathlib import Path
load = runpy.run_path({build.__file__!r})["load"]  # by path: it needs no torch, and starts ten times as fast
print(load(*map(Path, {[str(path) for path in LIBRARY.sources]!r})).kernel_fits(0, 0, 0))
"""
WITHOUT = """
import torch
from llmsparse.backends.cpu import prepare, why_not
from llmsparse.formats.bitmask import Bitmask
print(why_not())
prepare(Bitmask.pack(torch.ones(2, 2)))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where libraries are kept, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llmsparse"


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def reason() -> str:
    with pytest.raises(build.BuildError) as caught:
        build.load(*LIBRARY.sources)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_processes_that_build_at_the_same_time_leave_one_library(cache: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", LOAD], stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == [b"0\n"] * 3
    (library,) = cache.iterdir()
    assert library.suffix == ".so"
    built = library.stat().st_mtime_ns
    build.load(*LIBRARY.sources)
    assert library.stat().st_mtime_ns == built  # the second time it is only loaded


def test_another_source_compiler_or_flag_is_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed = tmp_path / "bitmask.c"
    changed.write_text(LIBRARY.sources[0].read_text() + "\n")
    names = {build.library_name(["cc"], LIBRARY.sources), build.library_name(["cc"], (changed, *LIBRARY.sources[1:]))}
    names |= {
        build.library_name(["cc", "-g"], LIBRARY.sources),
        build.library_name([script(tmp_path / "cc", "echo 9")], LIBRARY.sources),
    }
    monkeypatch.setattr(build, "FLAGS", ("-O0",))
    names.add(build.library_name(["cc"], LIBRARY.sources))
    assert len(names) == 5


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("CC", script(tmp_path / "cc", 'while [ "$1" != -o ]; do shift; done; echo > "$2"'))
    said = reason()
    (library,) = (tmp_path / ".cache" / "llmsparse").iterdir()
    assert said.startswith(f"{library} does not load (") and said.endswith("delete it to build it again")


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-cc -m64")
    assert reason() == "no C compiler: CC=no-such-cc -m64 is not on the PATH"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(cache))
    assert reason() == "no C compiler: none of cc, gcc, clang is on the PATH; install one or set CC"
    assert not cache.exists()


def test_a_compiler_that_fails(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = script(tmp_path / "cc", 'echo "In file x86.h:" >&2; echo "x86.h:1: error: no such thing" >&2; exit 1')
    monkeypatch.setenv("CC", f"{fake} -m64")
    assert reason() == f"{fake} -m64 failed on bitmask.c: x86.h:1: error: no such thing"
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("folder", ["a-file", "/proc/self/fdinfo"])
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str) -> None:
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
    assert reason().startswith(f"cache {tmp_path / folder}/llmsparse is not writable (")


def test_without_a_library_a_weight_is_refused_with_the_reason() -> None:
    environment = os.environ | {"CC": "no-such-cc"}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, check=False)
    why = "no C compiler: CC=no-such-cc is not on the PATH"
    assert done.stdout == f"{why}\n"
    assert done.stderr.endswith(f"MachineError: the CPU kernels cannot run here: {why}\n")
