"""Pruned checkpoints and the same packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sparse import save_sparse
from stored_mixtures import few_bits_of

import llmsparse

Folders = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """`folders(family, pattern="unstructured")`: a pruned checkpoint, and the same packed; made once."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(family: str, pattern: str = "unstructured") -> tuple[Path, Path]:
        if (family, pattern) not in made:
            root = tmp_path_factory.mktemp(family)
            pruned = save_sparse(family, root / "pruned", pattern=pattern)
            llmsparse.pack(str(pruned), root / "packed")
            made[family, pattern] = pruned, root / "packed"
        return made[family, pattern]

    return make


@pytest.fixture(scope="session")
def few_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_bits_of(tmp_path_factory.mktemp("few_bits"))
