"""torchrun itself, on two nodes as far as it can tell: the bytes of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import free_port


@pytest.mark.slow
def test_two_nodes_make_what_one_process_does(tiny_llama: Callable[..., Path], text: str, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text(text[:40_000], encoding="utf-8")
    asked = ["prune", str(tiny_llama(tmp_path / "model")), "--sparsity", "0.6", "--calibration", str(notes)]
    asked += ["--calibration-samples", "8", "--seq-len", "32", "--match-steps", "2"]
    port, environment = free_port(), os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1",
             "--master-addr", "127.0.0.1", "--master-port", port, "-m", "llmsparse", *asked, "-o", str(tmp_path / "two")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    (first, _), (second, said) = (node.communicate(timeout=300) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "perplexity" in first and not second and "llmsparse" not in said
    one = [sys.executable, "-m", "llmsparse", *asked, "-o", str(tmp_path / "one")]
    subprocess.run(one, check=True, env=environment, stdout=subprocess.DEVNULL)
    name = "model.safetensors"
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
