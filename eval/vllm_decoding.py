"""Tokens a second at batch 1 from three servers of the same model: vLLM's of the dense folder, vLLM's of the packed one, and ours of
that.

`.venv-vllm/bin/python -m eval.vllm_decoding [--rounds 3] [--threads 1] [--tokens 48] [--folder DIR]` builds the model of
`eval.end_to_end` (a Llama-3.2-1B shape, 70 % zeros by magnitude) and asks each server, by turns and one at a time, for a short and
a long answer to a prompt of 32 tokens; what the long one took more is the time of its further tokens. Rows go to
eval/results/vllm_decoding.csv. cpu_ms is time of the CPU by all of a server's processes, which others on the machine disturb
least; where threads wait for each other in a loop, as vLLM's do, waiting counts.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.cpu_speed import cpu_name
from eval.end_to_end import build
from eval.table import append

RESULTS = Path(__file__).parent / "results" / "vllm_decoding.csv"
DENSE, PACKED, OURS = "vLLM, dense bf16", "vLLM, packed 70 %", "llmsparse serve, packed 70 %"
FOLDERS = {DENSE: "pruned", PACKED: "packed", OURS: "packed"}
PROMPT, SHORT, PORT, PATIENCE = 32, 8, 8123, 900
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


def command(who: str, folder: Path) -> list[str]:
    model = str(folder / FOLDERS[who])
    if who == OURS:
        return [sys.executable, "-m", "llmsparse", "serve", model, "--port", str(PORT), "--device", "cpu"]
    limits = ["--max-model-len", "512", "--max-num-seqs", "4", "--no-enable-prefix-caching"]
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # what `vllm serve` runs
    return [*program, "--model", model, "--port", str(PORT), *limits]


@contextmanager
def served(who: str, folder: Path, threads: int) -> Iterator[int]:
    """The process that was started, once its server answers."""
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command(who, folder), env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while not answers():
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise SystemExit(f"{who} does not serve:\n{said.read()[-3000:]}")
                time.sleep(1)
            yield process.pid
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 2)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def answers() -> bool:
    with suppress(OSError), closing(http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)) as connection:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def ask(model: str, tokens: int) -> int:
    """How many tokens came."""
    body = {"model": model, "prompt": [100 + n for n in range(PROMPT)], "max_tokens": tokens, "temperature": 0}
    with closing(http.client.HTTPConnection("127.0.0.1", PORT, timeout=PATIENCE)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found = json.loads(answer.read())
    if answer.status != 200:
        raise SystemExit(f"answered {answer.status}: {found}")
    return found["usage"]["completion_tokens"]


def cpu_seconds(leader: int) -> float:
    """Of all processes of the session that this one began."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:  # its session
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(who: str, folder: Path, threads: int, tokens: int) -> dict[str, float]:
    """Milliseconds of a further token."""
    model = str(folder / FOLDERS[who])
    with served(who, folder, threads) as leader:
        ask(model, 2)  # what is made at first use
        spent: list[tuple[int, float, float]] = []
        for asked in (SHORT, SHORT + tokens):
            began, cpu = time.perf_counter(), cpu_seconds(leader)
            came = ask(model, asked)
            spent.append((came, time.perf_counter() - began, cpu_seconds(leader) - cpu))
    (few, short, short_cpu), (many, long, long_cpu) = spent
    if many <= few:
        raise SystemExit(f"{who}: {many} tokens came, {SHORT + tokens} were asked for")
    return {
        "ms": 1e3 * (long - short) / (many - few),
        "cpu_ms": 1e3 * (long_cpu - short_cpu) / (many - few),
    }


def prepared(folder: Path) -> Path:
    """The folder with the pruned and the packed model, and a tokenizer beside each, which servers want."""
    from llmsparse.models.origin import BUILTIN_FOLDER

    if not (folder / "packed").exists():
        build(folder)
    for name in set(FOLDERS.values()):
        for file in BUILTIN_FOLDER.glob("tokenizer*"):
            shutil.copy(file, folder / name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {who: [] for who in FOLDERS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepared(options.folder or Path(scratch))
        for _ in range(options.rounds):
            for who, runs in found.items():
                runs.append(measure(who, folder, options.threads, options.tokens))
                print(who, {key: round(value, 1) for key, value in runs[-1].items()}, flush=True)
    dense = statistics.median(run["ms"] for run in found[DENSE])
    machine = {"cpu": cpu_name(), "torch": version("torch"), "vllm": version("vllm-cpu"), "threads": options.threads}
    rows: list[dict[str, Any]] = []
    for who, runs in found.items():
        row: dict[str, Any] = machine | {"who": who, "rounds": len(runs)}
        for key in ("ms", "cpu_ms"):
            spent = [run[key] for run in runs]
            row |= {key: f"{statistics.median(spent):.1f}", f"{key}_min": f"{min(spent):.1f}"}
        middle = statistics.median(run["ms"] for run in runs)
        rows.append(row | {"tokens_per_s": f"{1e3 / middle:.1f}", "over_vllm_dense": f"{middle / dense:.3f}"})
    append(RESULTS, rows)
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
