"""`llmsparse run`: programs that load a model by its name load packed ones, and are left alone in all else."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmsparse
from llmsparse.errors import RecipeError
from llmsparse.packing.folder import HINT

RUN = [sys.executable, "-m", "llmsparse", "run"]
LOADS = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig
config = AutoConfig.from_pretrained(sys.argv[1]).quantization_config
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=AutoQuantizationConfig.from_dict(config))
print(type(model.model.layers[0].mlp.up_proj).__name__, sys.argv[2:])
"""


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command], capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sparse import save_sparse

    root = tmp_path_factory.mktemp("packed")
    llmsparse.pack(str(save_sparse("llama", root / "pruned")), root / "packed")
    return root / "packed"


@pytest.mark.parametrize(
    "way", [pytest.param("file", marks=pytest.mark.slow), "-m", pytest.param("-c", marks=pytest.mark.slow)]
)
def test_a_program_that_never_imports_llmsparse_loads_a_packed_folder(way: str, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "loads.py").write_text(LOADS)
    words = {"file": ["loads.py"], "-m": ["python", "-m", "loads"], "-c": ["python", "-c", LOADS]}[way]
    done = run(*RUN, "--", *words, str(packed), "--quiet", "-v", "--", "x", cwd=tmp_path, env=environment())
    assert done.stdout.split(" ", 1) == ["SparseLinear", "['--quiet', '-v', '--', 'x']\n"], done.stderr


@pytest.mark.slow
def test_without_it_a_program_ends_in_an_error_and_the_folder_names_the_way(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "loads.py").write_text(LOADS)
    done = run(sys.executable, str(tmp_path / "loads.py"), str(packed))
    assert done.returncode == 1 and "Unknown quantization type, got llmsparse" in done.stderr
    assert HINT in (packed / "config.json").read_text()
    assert "llmsparse run -- PROGRAM" in (packed / "README.md").read_text()


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(llmsparse.__file__).parents[1])} | more


@pytest.mark.parametrize(
    ("code", "status", "stderr"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(41)", 41, ""),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("raise MemoryError", 1, "MemoryError\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
    ],
)
def test_its_end_is_that_of_the_program(code: str, status: int, stderr: str) -> None:
    done = run(*RUN, "--", "python", "-c", code)
    assert (done.returncode, done.stdout) == (status, "") and done.stderr.endswith(stderr)
    assert "llmsparse" not in done.stderr


def test_it_is_ended_by_signals_as_any_program() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert run(*RUN, "--", "python", "-c", code).returncode == -signal.SIGTERM


def test_scripts_see_themselves_as_python_shows_them(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("NAME = 'beside'")
    script = tmp_path / "script.py"
    script.write_text("import sys, neighbour\nprint(__name__, __file__, sys.argv, neighbour.NAME)")
    expected = run(sys.executable, str(script), "a b", "--help").stdout
    assert run(*RUN, "--", "python", str(script), "a b", "--help").stdout == expected
    assert run(*RUN, str(script), "a b", "--help").stdout == expected  # the dashes may be left out


def test_a_command_of_an_installed_package_runs_by_its_name() -> None:
    assert run(*RUN, "--", "pytest", "--version").stdout == run(sys.executable, "-m", "pytest", "--version").stdout
    nested = run(*RUN, "--", "llmsparse", "--version")
    assert nested.stdout == f"llmsparse {llmsparse.__version__}\n"


def a_shell_script(folder: Path) -> str:
    file = folder / "shell"
    file.write_text("#!/bin/sh\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (lambda _: [], "run needs a program"),
        (lambda _: ["lm-eval-of-nobody"], "lm-eval-of-nobody: no such program in this environment"),
        (lambda folder: [a_shell_script(folder)], "no Python program"),
        (lambda _: ["python", "-u", "x.py"], "python -u -m llmsparse run"),
        (lambda _: ["python"], "wanted python FILE"),
        (lambda _: ["python", "-m"], "wanted python FILE"),
        (lambda _: ["python", "nowhere.py"], "nowhere.py: no such file"),
        (lambda _: ["/somewhere/else/python3", "x.py"], "another Python than this one"),
    ],
)
def test_what_is_no_program_of_this_environment_is_refused(
    words: Callable[[Path], list[str]], said: str, tmp_path: Path
) -> None:
    from llmsparse.cli.program import run_program

    with pytest.raises(RecipeError, match=said) as caught:
        run_program(words(tmp_path))
    assert "\n" not in str(caught.value)


def test_it_loads_nothing_heavy_by_itself() -> None:
    done = run(*RUN, "--", "python", "-c", "import sys; print('torch' in sys.modules, 'llmsparse' in sys.modules)")
    assert done.stdout == "False True\n"
