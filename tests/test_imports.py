"""Who may import whom, and what the command line must not load before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import llmsparse

ROOT = Path(llmsparse.__file__).parent
HEAVY = ("torch", "yaml", "transformers", "datasets", "safetensors", "huggingface_hub", "numpy")
USES_INTERNALS = {  # of transformers
    "llmsparse.inference.experts_interface",
    "llmsparse.inference.places",
    "llmsparse.inference.quantizer",
    "llmsparse.models.cut_block",
    "llmsparse.models.empty_model",
    "llmsparse.models.naming",
    "llmsparse.serving.template",
    "llmsparse.serving.tool_calls",
}
STOREYS = [  # a room may import what stands on a storey above it in this list, and nothing else
    "errors version",
    "sparsity storage ranks",
    "formats encodings text pruners",
    "models backends",
    "runs calibration",
    "packing",
    "evaluation scoring",
    "pruning factorization shrinking quantization cutting inference",
    "tuning",
    "serving benchmark vllm",
    "demo",
    "cli",
]
FLOOR = {room: floor for floor, rooms in enumerate(STOREYS) for room in rooms.split()}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that can run: all but what only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from statements(child)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inside}
    return names


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def reachable(name: str) -> set[str]:
    seen, left = set[str](), [name]
    while left:
        new = {found for found in IMPORTS.get(left.pop(), set()) if found in MODULES} - seen
        seen |= new
        left += new
    return seen


def test_no_module_imports_what_imports_it() -> None:
    graph = {name: {found for found in found_all if found in MODULES} for name, found_all in IMPORTS.items()}
    graph["llmsparse.demo.run"] = (
        set()
    )  # others know where its model is; what it does is a command, and stands above them
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_nothing_below_the_command_line_imports_it() -> None:
    users = {name for name, found in IMPORTS.items() if any(one.startswith("llmsparse.cli.app") for one in found)}
    assert all(name.startswith("llmsparse.cli.app") or name == "llmsparse.__main__" for name in users)


def test_nothing_imports_the_evaluation_scripts() -> None:
    assert not [name for name, found in IMPORTS.items() if any(one.split(".")[0] == "eval" for one in found)]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("llmsparse.pruners")])
def test_methods_know_nothing_of_models_and_files(name: str) -> None:
    known = {
        "llmsparse",
        "llmsparse.errors",
        "llmsparse.sparsity",
        "llmsparse.sparsity.patterns",
        "llmsparse.sparsity.stats",
    }
    assert not {found for found in reachable(name) - known if not found.startswith("llmsparse.pruners")}


def test_the_internals_of_transformers_are_touched_in_one_place() -> None:
    users = {name for name, found in IMPORTS.items() if any(one.startswith("transformers.") for one in found)}
    assert users <= USES_INTERNALS


def test_public_names_are_what_they_say() -> None:
    for name in llmsparse.__all__:
        assert getattr(llmsparse, name) is not None
    assert callable(llmsparse.prune) and callable(llmsparse.perplexity) and callable(llmsparse.inspect)
    assert set(llmsparse.__all__) <= set(dir(llmsparse))
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        llmsparse.prnue  # noqa: B018


@pytest.mark.parametrize(
    "code", ["import llmsparse", "import llmsparse.cli.app; assert llmsparse.cli.app.main(['prune', '--help']) == 0"]
)
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    check = f"import sys; loaded = [name for name in {HEAVY} if name in sys.modules]; assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
