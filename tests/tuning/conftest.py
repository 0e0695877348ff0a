"""A random dense model, mixtures made of it, and text to tune them on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

import llmsparse

MADE: dict[str, Any] = {"calibration_samples": 24, "seq_len": 32, "router_steps": 20, "device": "cpu"}
LAYOUTS = {"glm4_moe": {"experts": 8, "shared": 2, "active": 2}, "mixtral": {"experts": 4, "shared": 0, "active": 2}}


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Generator[None, None, None]:
    """A shell that starts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def dense(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("dense") / "tiny")


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    file.write_text(text[:40_000], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def mixtures(dense: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Container → folder that `factorize` wrote."""
    folder = tmp_path_factory.mktemp("mixtures")
    for name, layout in LAYOUTS.items():
        llmsparse.factorize(model=str(dense), output=str(folder / name), calibration=str(notes), **MADE, **layout)
    return {name: folder / name for name in LAYOUTS}


@pytest.fixture(scope="session")
def moe(mixtures: dict[str, Path]) -> Path:
    return mixtures["glm4_moe"]


@pytest.fixture(scope="session")
def keys(dense: Path, notes: Path) -> dict[str, Any]:
    """A short run, but for the model and where it is written."""
    return {"teacher": str(dense), "text": str(notes), "seq_len": 32, "batch_size": 8, "steps": 6, "device": "cpu"}
