"""The session for the first GPU at hand, run in the dry: what it would find there stays unknown, that it finds it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.gpu_session import record

ROOT = Path(__file__).parents[1]


def session(out: Path, stages: str, **settings: str) -> tuple[str, list[dict[str, Any]]]:
    """What eval/gpu_session.sh prints, and the lines that it leaves."""
    environment = os.environ | {"OUT": str(out), "STAGES": stages, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "STRETCH": "10", "BUDGET": "3000"} | settings
    done = subprocess.run(
        ["bash", "eval/gpu_session.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found = out / "session.jsonl"
    return done.stdout, [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []


@pytest.mark.slow
def test_every_stage_of_the_kernels_runs(tmp_path: Path) -> None:
    said, lines = session(tmp_path, "info right times experts decode")
    assert "== rc" not in said and [line for line in lines if not record.is_right(line)] == []
    assert {line["stage"] for line in lines} == {"info", "right", "times", "experts", "decode"}
    timed = {line["kernel"].split()[0].split("-")[0] for line in lines if line["stage"] == "times"}
    assert timed >= {"dense", "mma24", "select24", "join24", "split24", "bitmask", "sell"}
    assert all(line["us"] > 0 and "vs_dense" in line for line in lines if line["stage"] == "times")
    steps = {line["run"] for line in lines if line["stage"] == "decode"}
    assert steps >= {"dense", "mma24", "mma24 stacked", "split24 stacked", "sell stacked"}
    swapped = [line for line in lines if "error_if_metadata_were_swapped" in line]
    assert swapped and all(line["error_if_metadata_were_swapped"] > 0.1 > line["error"] for line in swapped)


@pytest.mark.slow
def test_what_a_user_does_runs(tmp_path: Path) -> None:
    said, lines = session(tmp_path, "library prune")
    assert "== rc" not in said and [line for line in lines if not record.is_right(line)] == []
    loaded = [line["backend"] for line in lines if line["stage"] == "library" and "far_1_token" in line]
    assert loaded == ["dense", "dense-lowmem", "auto"] * 2  # the others need a GPU, and said so
    assert sum("needs an NVIDIA GPU" in line.get("failed", "") for line in lines) == 6
    pruned = [line for line in lines if line["stage"] == "prune" and "seconds" in line]
    assert [line["method"] for line in pruned] == ["wanda"] * 3 and pruned[1]["spent"]


def test_no_stage_begins_after_the_budget(tmp_path: Path) -> None:
    said, lines = session(tmp_path, "info times", BUDGET="5")
    assert said.count("no time left") == 7 and "nothing was found" in said and not lines


def test_a_failure_is_a_line_and_a_lost_device_ends_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "OUT", tmp_path / "new")
    with record.attempt("times", kernel="a"):
        raise ValueError("no")
    with pytest.raises(RuntimeError, match="illegal"), record.attempt("times", kernel="b"):
        raise RuntimeError("CUDA error: an illegal memory access")
    record.say("right", ok=True)
    lines = [json.loads(line) for line in (tmp_path / "new" / "session.jsonl").read_text().splitlines()]
    assert [line.get("failed") for line in lines[:2]] == [
        "ValueError: no", "RuntimeError: CUDA error: an illegal memory access"
    ]  # fmt: skip
    assert [record.is_right(line) for line in lines] == [False, False, True]
    record.summary()
    assert capsys.readouterr().out.count("failed") == 4  # once as they came, and once in the summary
