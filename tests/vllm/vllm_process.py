"""vLLM in a process of its own, since two engines in one fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

VLLM = find_spec("vllm")
needs_vllm = pytest.mark.skipif(VLLM is None or VLLM.origin is None, reason="vllm is not installed: make test-vllm")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def run_vllm(folder: Path, backend: str = "auto", **options: Any) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("continue_by_vllm.py")
    given = [f"{key}={json.dumps(value)}" for key, value in ({"dtype": "float32"} | options).items()]
    environment = os.environ | ENVIRONMENT | {"LLMSPARSE_BACKEND": backend}
    return subprocess.run(
        [sys.executable, str(script), str(folder), *given], env=environment, capture_output=True, text=True, check=False
    )


def said_by_vllm(folder: Path, backend: str = "auto", **options: Any) -> list[list[int]]:
    """The ids after each of PROMPTS."""
    done = run_vllm(folder, backend, **options)
    found = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    assert found, done.stderr[-2000:] + done.stdout[-2000:]
    return json.loads(found[-1])
