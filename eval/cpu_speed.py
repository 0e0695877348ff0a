"""Milliseconds of products with sparse weights on the CPU, beside dense ones in the same run.

`python -m eval.cpu_speed [--threads 1,2] [--rows 1,2,4,8,16] [--shapes 4096x4096,…] [--sparsities 0.7,2:4] [--seconds 6]`
writes eval/results/cpu.csv. bf16, random weights, x of a few rows:

    torch bf16, torch fp32    torch.nn.functional.linear with the dense weight
    C bf16                    eval/dense_gemv.c: a dense loop that reads as fast as a core can
    llmsparse                 llmsparse.cpu.matvec; above kernel_rows() expand() into a scratch buffer, then torch

The variants take turns, all on pages of 2 MB where the system has them. Each has as many copies of its weight as it takes to
read more than twice the L3 cache before one is read again. Two ratios are printed, because most of the first is a better
loop: to torch bf16 and to C bf16.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p
from itertools import product
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmsparse.backends import cpu
from llmsparse.backends.cpu import pages
from llmsparse.backends.cpu.build import find_compiler, load, openmp_runtime
from llmsparse.backends.cpu.kernel_library import HERE
from llmsparse.formats.bitmask import Bitmask

RESULTS = Path(__file__).parent / "results" / "cpu.csv"
DENSE = Path(__file__).parent / "dense_gemv.c"
DEFAULT_CACHE = 32 << 20
T = TypeVar("T")
COLUMNS = [
    "cpu", "torch", "compiler", "threads", "load", "out", "in", "sparsity", "rows", "variant", "rounds", "p20_ms", "median_ms",
    "p80_ms", "min_ms", "gb_s", "byte_limit", "times_torch bf16", "times_C bf16", "min_times_torch bf16", "min_times_C bf16",
]  # fmt: skip


def cache_bytes() -> int:
    """The last-level cache, as Linux tells it."""
    sizes = [file.read_text() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.strip().removesuffix("K")) << 10 for size in sizes), default=DEFAULT_CACHE)


def cpu_name() -> str:
    """The model, and the family and model numbers, which say more where a cloud hides the name."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = {key: value for key, value in re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE)}
    return f"{found.get('model name', platform.machine())} {found.get('cpu family')}/{found.get('model')}"


def compiler_version() -> str:
    done = subprocess.run([*find_compiler(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def dense_loop() -> Callable[[Tensor, Tensor], Tensor] | None:
    """x, weight → y by the C loop, where this CPU has its instructions."""
    c, runtime = load(DENSE, *(HERE / name for name in ("tiles.h", "floats.h", "team.h"))), openmp_runtime()
    if not c.dense_runs_here():
        return None
    if runtime is not None:
        team = (runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads)
        c.use_team(*(ctypes.cast(function, c_void_p) for function in team))
    c.dense_matvec.argtypes = (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32)
    c.dense_matvec.restype = None

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
        pointers = (weight.data_ptr(), x.data_ptr(), y.data_ptr())
        c.dense_matvec(*pointers, *weight.shape, x.shape[0], torch.get_num_threads())
        return y

    return multiply


def random_weight(out: int, width: int, sparsity: str) -> tuple[Tensor, str]:
    """A bf16 weight and its pattern; `sparsity` is a fraction or N:M."""
    weight = torch.randn(out, width)
    if ":" not in sparsity:
        return weight.masked_fill_(torch.rand(out, width) < float(sparsity), 0).bfloat16(), "unstructured"
    n, m = map(int, sparsity.split(":"))
    groups = weight.view(-1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(n, dim=1).indices, True)
    return groups.masked_fill_(~keep, 0).view(out, width).bfloat16(), sparsity


class Copies(Generic[T]):
    """Copies of one weight, taken by turns, enough to be read from memory each time."""

    def __init__(self, bytes_each: int, make: Callable[[], T]) -> None:
        self.bytes = bytes_each
        self._made = [make() for _ in range(max(2, -(-2 * cache_bytes() // bytes_each) + 1))]
        self._turn = 0

    def next(self) -> T:
        self._turn = (self._turn + 1) % len(self._made)
        return self._made[self._turn]


def measure(variants: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each, sorted; they take turns until the time is up."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: sorted(times) for name, times in taken.items()}


def check(variants: dict[str, Callable[[], Tensor]], wanted: Tensor) -> None:
    """Every bf16 variant is within 1.2 times torch's own error against float64."""
    errors = {name: (run().double() - wanted).norm() for name, run in variants.items() if name != "torch fp32"}
    for name, error in errors.items():
        assert error <= 1.2 * errors["torch bf16"], (name, errors)


class Case:
    """One weight, in every form, and what multiplies with it."""

    def __init__(self, shape: str, sparsity: str, c_loop: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        self.shape, self.sparsity, self._c_loop = shape, sparsity, c_loop
        self.out, self.width = map(int, shape.split("x"))
        self.weight, pattern = random_weight(self.out, self.width, sparsity)
        packed = Bitmask.pack(self.weight, pattern)
        self._scratch = pages.zeros(self.weight.shape, self.weight.dtype)
        self.half = Copies(self.weight.nbytes, lambda: pages.copy(self.weight))
        self.full = Copies(2 * self.weight.nbytes, lambda: pages.copy(self.weight.float()))
        self.sparse = Copies(cpu.prepare(packed).nbytes, lambda: cpu.prepare(packed))

    def variants(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        x_full = x.float()
        found: dict[str, Callable[[], Tensor]] = {
            "torch bf16": lambda: linear(x, self.half.next()),
            "torch fp32": lambda: linear(x_full, self.full.next()),
            "llmsparse": lambda: self._ours(x),
        }
        if self._c_loop is not None:
            loop = self._c_loop
            found["C bf16"] = lambda: loop(x, self.half.next())
        return found

    def bytes_of(self, variant: str) -> int:
        return {"torch fp32": self.full.bytes, "llmsparse": self.sparse.bytes}.get(variant, self.half.bytes)

    def _ours(self, x: Tensor) -> Tensor:
        if len(x) <= cpu.kernel_rows(x.dtype, x.dtype):
            return cpu.matvec(self.sparse.next(), x)
        return linear(x, cpu.expand(self.sparse.next(), self._scratch))


def report(case: Case, rows: int, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row of the table for each variant; ratios are of medians, and of minima where others disturb the machine."""
    median = {name: found[len(found) // 2] for name, found in times.items()}
    table: list[dict[str, Any]] = []
    for name, found in times.items():
        n, size = len(found), case.bytes_of(name)
        row: dict[str, Any] = {
            "threads": torch.get_num_threads(),
            "load": f"{os.getloadavg()[0]:.1f}",
            "out": case.out,
            "in": case.width,
        }
        row |= {"sparsity": case.sparsity, "rows": rows, "variant": name, "rounds": n}
        row |= {"p20_ms": found[n // 5], "median_ms": median[name], "p80_ms": found[n * 4 // 5], "min_ms": found[0]}
        row |= {key: f"{value * 1e3:.3f}" for key, value in row.items() if key.endswith("_ms")}
        row |= {"gb_s": f"{size / median[name] / 1e9:.1f}", "byte_limit": f"{case.half.bytes / size:.2f}"}
        for other in ("torch bf16", "C bf16"):
            if other in times:
                row[f"times_{other}"] = f"{median[other] / median[name]:.2f}"
                row[f"min_times_{other}"] = f"{times[other][0] / found[0]:.2f}"
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rows", default="1,2,4,8,16")
    parser.add_argument("--shapes", default="11008x4096,4096x11008,4096x4096")
    parser.add_argument("--sparsities", default="0.5,0.7,0.9,2:4")
    parser.add_argument("--seconds", type=float, default=6)
    options = parser.parse_args()
    torch.manual_seed(0)
    c_loop = dense_loop()
    machine = {"cpu": cpu_name(), "torch": torch.__version__, "compiler": compiler_version()}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for shape, sparsity in product(options.shapes.split(","), options.sparsities.split(",")):
            case = Case(shape, sparsity, c_loop)
            for threads, rows in product(options.threads.split(","), options.rows.split(",")):
                torch.set_num_threads(int(threads))
                x = torch.randn(int(rows), case.width).bfloat16()
                variants = case.variants(x)
                check(variants, x.double() @ case.weight.double().T)
                table = report(case, len(x), measure(variants, options.seconds))
                writer.writerows(machine | row for row in table)
                file.flush()
                ours = next(row for row in table if row["variant"] == "llmsparse")
                print(
                    f"{shape:11s} {sparsity:4s} rows {rows} threads {threads}",
                    *(f"{row['variant']} {row['median_ms']} ({row['min_ms']})" for row in table),
                    "ms, median (min)",
                    *(f"| {key.removeprefix('times_')} × {ours[key]} ({ours[f'min_{key}']})" for key in ours if key.startswith("times_")),
                    f"| byte limit {ours['byte_limit']}",
                    flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
