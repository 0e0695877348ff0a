from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import triton_ops

MODULES = sorted(Path(triton_ops.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_kernels_depend_on_torch_and_triton_alone(path: Path) -> None:
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) <= {"torch", "triton", "triton_ops"}
