"""The C sources under AddressSanitizer and UndefinedBehaviorSanitizer, with everything that they take drawn at random."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from llmsparse.backends.cpu import build
from llmsparse.backends.cpu.kernel_library import HERE

FLAGS = ("-O1", "-g", "-std=gnu11", "-fno-strict-aliasing", "-fopenmp", "-pthread", "-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


@pytest.fixture(
    scope="module",
    params=[
        "fuzz",
        "fuzz_experts",
        "fuzz_dense",
        "fuzz_attention",
        "fuzz_norm",
        "fuzz_nested",
        "fuzz_columns",
        "fuzz_readers",
    ],
)
def fuzz(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("fuzz") / request.param
    source = Path(__file__).with_name(f"{request.param}.c")
    command = [*build.find_compiler(), *FLAGS, *SANITIZERS, f"-I{HERE}", str(source), "-o", str(program), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in done.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_sanitizers_find_nothing(fuzz: Path, seed: int) -> None:
    done = subprocess.run(
        [fuzz, "1000", str(seed)],
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == "all right\n", done.stdout + done.stderr
