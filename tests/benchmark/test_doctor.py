"""What the doctor says of this machine."""

from __future__ import annotations

import json

import pytest
import torch

import llmsparse
from llmsparse.backends import BACKENDS
from llmsparse.cli.app import main


def test_every_backend_is_usable_or_refused_with_a_reason() -> None:
    diagnosis = llmsparse.diagnose()
    assert [backend.name for backend in diagnosis.backends] == list(BACKENDS)
    assert all(backend.refused is None or backend.refused for backend in diagnosis.backends)
    usable = {backend.name for backend in diagnosis.backends if backend.refused is None}
    assert {"dense", "dense-lowmem"} <= usable
    if not torch.cuda.is_available():
        assert not usable & {"mma24", "split24", "select24", "bitmask", "cusparselt"}
    assert diagnosis.versions["torch"] == torch.__version__
    assert diagnosis.devices[0].memory_bytes > 2**28


def test_without_a_compiler_the_cpu_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "llmsparse.backends.cpu.why_not", lambda: "no C compiler: none of cc, gcc, clang is on the PATH"
    )
    (kernel,) = [backend for backend in llmsparse.diagnose().backends if backend.name == "cpu-bitmask"]
    assert kernel.refused is not None and kernel.refused.startswith("no C compiler")


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in BACKENDS)
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"versions", "devices", "backends", "experts", "measured"} == set(document)
