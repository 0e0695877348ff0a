"""Whatever a packed folder holds, reading it is an error in one line or the right answer. LLMSPARSE_FUZZ_ROUNDS damages as
many folders as it says in place of the slow tier's number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROUNDS = int(os.environ.get("LLMSPARSE_FUZZ_ROUNDS", "30000"))


@pytest.mark.parametrize(("rounds", "seed"), [(400, 0), pytest.param(ROUNDS, 1, marks=pytest.mark.slow)])
def test_a_damaged_folder_is_refused_or_read_right(rounds: int, seed: int, tmp_path: Path) -> None:
    program = Path(__file__).with_name("fuzz_packed.py")
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(program), str(rounds), str(seed), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.startswith("all right: ")
    found = json.loads(done.stdout.removeprefix("all right: "))
    assert sum(found.values()) == rounds and found["read"] > rounds / 100 and found["CheckpointError"] > rounds / 2
