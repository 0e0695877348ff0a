"""How much faster several processes work than one, at the same bytes.

`python -m eval.processes [--methods a,b] [--processes 1,2,4]` builds the two blocks of Llama-3.2-1B of `eval.speed`, prunes
them with 16 × 512 tokens by processes of one thread each, and appends to eval/results/processes.csv. `--small` builds four blocks of
512 / 2048 instead, and 64 × 256 tokens; methods besides those of pruning are `shrink`, `factorize` and `tune`. Where more runs on a
machine than it has cores, the clock says little of how fast they would be alone. So beside it stands the critical path: the
sum, over the stretches between two meetings of all processes, of the CPU seconds that the busiest main thread took. For one
process that is the CPU time of its main thread.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from eval.speed import SHAPES, Shape, build

RESULTS = Path(__file__).parent / "results" / "processes.csv"
HEADER = [
    "device", "threads", "torch", "shape", "blocks", "tokens", "method", "processes", "seconds", "critical_cpu_s", "cpu_s",
    "peak_mb_each", "speedup_clock", "speedup_critical", "same_bytes",
]  # fmt: skip

SMALL = Shape("512 / 2048", 512, 2048, 8, 4, 4, 16, 64, 256)
LAYOUT = {"experts": 8, "shared": 2, "active": 2}
VERBS: dict[str, dict[str, Any]] = {  # beside `prune`, whose methods are all other names
    "shrink": {"ffn": "75%"},
    "factorize": LAYOUT,
    "tune": {"steps": 4, "batch_size": 8},
}


def asked_of(method: str, folder: Path, out: Path) -> tuple[str, dict[str, Any]]:
    """A verb, and the keys of its recipe."""
    model, tokens = str(folder / "model"), str(folder / "tokens.safetensors")
    common = {"model": model, "output": str(out), "device": "cpu"}
    if method == "tune":
        return "tune", common | {"model": str(folder / "mixture"), "teacher": model, "text": tokens} | VERBS["tune"]
    common |= {"calibration": tokens}
    if method in VERBS:
        return method, common | VERBS[method]
    return "prune", common | {"method": method, "sparsity": 0.5, "match_steps": 0}


def child(method: str, folder: Path, out: Path) -> None:
    """One of the processes: its stretches of CPU seconds, as JSON."""
    import llmsparse
    from llmsparse.ranks import messages
    from llmsparse.ranks.launch import joined
    from llmsparse.runs import verbs
    from llmsparse.runs.memory import PeakMemory

    torch.set_num_threads(1)
    stretches: list[float] = []
    meet, last = messages.broadcast, time.thread_time()

    def meeting(value: object, source: int) -> object:
        nonlocal last
        stretches.append(time.thread_time() - last)
        found = meet(value, source)
        last = time.thread_time()
        return found

    messages.broadcast = meeting
    verb, asked = asked_of(method, folder, out)
    recipe = verbs.VERBS[verb].load_recipe()(**asked)
    llmsparse.plan(recipe)  # imports what it needs before the clock starts, transformers' code for the model too
    ranks = joined()
    ranks.gather(None)
    stretches.clear()
    started, cpu, last = time.perf_counter(), time.process_time(), time.thread_time()
    with PeakMemory(torch.device("cpu")) as memory:
        verbs.VERBS[verb].load_run()(recipe)
    stretches.append(time.thread_time() - last)
    found = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "peak": memory.bytes}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found | {"stretches": stretches}))


def run(method: str, processes: int, folder: Path) -> dict[str, float]:
    out = folder / f"out-{method}-{processes}"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--no-python",
        sys.executable,
    ]
    command = command if processes > 1 else [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "-m", "eval.processes", "--child", method, str(folder), str(out)], check=True, env=environment
    )
    ended = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return {
        "seconds": max(one["seconds"] for one in ended),
        "critical": sum(max(stretch) for stretch in zip(*(one["stretches"] for one in ended), strict=True)),
        "cpu": sum(one["cpu"] for one in ended),
        "peak": max(one["peak"] for one in ended) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="wanda,sparsegpt")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--child", nargs=3)
    options = parser.parse_args()
    if options.child:
        method, folder, out = options.child
        return child(method, Path(folder), Path(out))
    shape, new = SMALL if options.small else SHAPES["cpu"], not RESULTS.exists()
    with tempfile.TemporaryDirectory() as name, RESULTS.open("a", newline="", encoding="utf-8") as file:
        folder, writer = Path(name), csv.writer(file)
        if new:
            writer.writerow(HEADER)
        build(shape, folder)
        if "tune" in options.methods.split(","):
            import llmsparse

            keys = {"calibration": str(folder / "tokens.safetensors"), "calibration_samples": 8, "device": "cpu"}
            llmsparse.factorize(model=str(folder / "model"), output=str(folder / "mixture"), **LAYOUT, **keys)
        for method in options.methods.split(","):
            one: dict[str, float] = {}
            first = b""
            for processes in map(int, options.processes.split(",")):
                found = run(method, processes, folder)
                written = (folder / f"out-{method}-{processes}" / "model.safetensors").read_bytes()
                one, first = one or found, first or written
                row = [
                    "cpu", 1, torch.__version__, shape.name, shape.blocks, shape.windows * shape.tokens, method, processes,
                    f"{found['seconds']:.1f}", f"{found['critical']:.1f}", f"{found['cpu']:.1f}", f"{found['peak']:.0f}",
                    f"{one['seconds'] / found['seconds']:.2f}", f"{one['critical'] / found['critical']:.2f}", written == first,
                ]  # fmt: skip
                writer.writerow(row)
                file.flush()
                print(*row, sep="\t", flush=True)


if __name__ == "__main__":
    main()
