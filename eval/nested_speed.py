"""Milliseconds of one token through a weight of few bits on the CPU, beside a 4-bit loop and a dense one in the same run.

`python -m eval.nested_speed [--threads 1,2] [--shapes 4096x11008] [--steps 1.2,0.8] [--seconds 6]` writes
eval/results/nested.csv. Weights are normal, with steps of so many root mean squares of a row, rounded to the nearest:

    exact      nested.matvec: bf16 activations, sums in float32
    int8       the same with activations of 8 bits, which are made of bf16 in the time that is told
    Q4         eval/q4_gemv.c: 4 bits with a scale for 32 columns, as llama.cpp's Q4_0, activations of 8 bits
    dense      eval/dense_gemv.c: a bf16 loop that reads as fast as a core can

By turns, on pages of 2 MB, as many copies of each as are twice the L3 cache. `bits` are those in memory, `stored` on disk.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.cpu_speed import Copies, compiler_version, cpu_name, dense_loop, measure
from eval.table import write
from llmsparse.backends.cpu import nested, pages
from llmsparse.backends.cpu.build import load, openmp_runtime
from llmsparse.backends.cpu.kernel_library import HERE
from llmsparse.formats.nested import Nested

RESULTS = Path(__file__).parent / "results" / "nested.csv"
Q4 = Path(__file__).parent / "q4_gemv.c"
LOOP = Callable[[Tensor, Tensor, Tensor], Tensor]


def q4_loop() -> LOOP:
    """values, scales, x → y by the C loop."""
    c, runtime = load(Q4, *(HERE / name for name in ("floats.h", "team.h"))), openmp_runtime()
    if not c.q4_runs_here():
        raise SystemExit("this CPU has no AVX-512 VNNI")
    if runtime is not None:
        team = (runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads)
        c.use_team(*(ctypes.cast(function, c_void_p) for function in team))
    c.q4_matvec.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int32)

    def multiply(values: Tensor, scales: Tensor, x: Tensor) -> Tensor:
        rows, width = 16 * len(values), 32 * values.shape[1]
        y = torch.empty(rows, dtype=torch.bfloat16)
        pointers = (tensor.data_ptr() for tensor in (values, scales, x, y))
        assert c.q4_matvec(*pointers, rows, width, torch.get_num_threads()) == 0
        return y

    return multiply


def q4_of(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values (out / 16, in / 32, 256), scales fp16 (out / 16, in / 32, 16), and the weight that they stand for, fp32 (out, in)."""
    out, width = weight.shape
    blocks = weight.view(out, width // 32, 32)
    scales = (blocks.abs().amax(2) / 7).half()
    q = (blocks / scales[..., None].float()).round().clamp(-8, 7)
    made = (q * scales[..., None].float()).view(out, width)
    parts = (
        (q + 8).to(torch.uint8).view(out // 16, 16, width // 32, 4, 2, 4)
    )  # side, row, block, l, even or odd, column
    bytes_of = parts[..., 0, :] | parts[..., 1, :] << 4
    values = bytes_of.permute(0, 2, 3, 1, 4).reshape(out // 16, width // 32, 256)
    return pages.copy(values.contiguous()), pages.copy(scales.view(out // 16, 16, -1).mT.contiguous()), made


def nested_of(weight: Tensor, step: float) -> Nested:
    steps = (step * weight.square().mean(1, keepdim=True).sqrt()).bfloat16()
    q = (weight / steps.float()).round().clamp(-127, 127).to(torch.int8)
    return Nested.encode(q, steps, torch.bfloat16)


def copied(weight: nested.CpuNested) -> nested.CpuNested:
    return replace(
        weight,
        pairs=pages.copy(weight.pairs),
        escapes=[pages.copy(part) for part in weight.escapes],
        counts=pages.copy(weight.counts),
    )


def close(found: Tensor, wanted: Tensor, most: float) -> None:
    error = ((found.flatten().double() - wanted).norm() / wanted.norm()).item()
    assert error < most, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--shapes", default="4096x11008")
    parser.add_argument("--steps", default="1.2,0.8")
    parser.add_argument("--seconds", type=float, default=6)
    options = parser.parse_args()
    torch.manual_seed(0)
    dense_c, q4_c = dense_loop(), q4_loop()
    assert dense_c is not None
    table: list[dict[str, Any]] = []
    machine = {"cpu": cpu_name(), "torch": torch.__version__, "compiler": compiler_version()}
    for shape, step in product(options.shapes.split(","), map(float, options.steps.split(","))):
        out, width = map(int, shape.split("x"))
        weight, x = torch.randn(out, width), torch.randn(1, width).bfloat16()
        packed = nested_of(weight, step)
        stored = 8 * sum(tensor.nbytes for tensor in packed.tensors().values()) / weight.numel()
        few, (values, scales, of_q4) = nested.prepare(packed), q4_of(weight)
        exact = x.double() @ packed.unpack().double().T
        close(nested.matvec(few, x), exact.flatten(), 4e-3)
        close(nested.matvec(few, x, int8=True), exact.flatten(), 1.5e-2)
        close(q4_c(values, scales, x), (x.double() @ of_q4.double().T).flatten(), 1.5e-2)
        halves = Copies(2 * weight.numel(), lambda weight=weight: pages.copy(weight.bfloat16()))
        fews = Copies(few.nbytes, lambda few=few: copied(few))
        fours = Copies(values.nbytes + scales.nbytes, lambda a=values, b=scales: (pages.copy(a), pages.copy(b)))
        variants: dict[str, Callable[[], Tensor]] = {
            "exact": lambda fews=fews, x=x: nested.matvec(fews.next(), x),
            "int8": lambda fews=fews, x=x: nested.matvec(fews.next(), x, int8=True),
            "Q4": lambda fours=fours, x=x: q4_c(*fours.next(), x),
            "dense": lambda halves=halves, x=x: dense_c(x, halves.next()),
        }
        bits = {name: 8 * copies.bytes / weight.numel() for name, copies in (("Q4", fours), ("dense", halves))}
        for threads in map(int, options.threads.split(",")):
            torch.set_num_threads(threads)
            times = measure(variants, options.seconds)
            for name, found in times.items():
                middle = found[len(found) // 2]
                row: dict[str, Any] = {"threads": threads, "out": out, "in": width, "step": step, "variant": name}
                row |= {"bits": f"{bits.get(name, 8 * few.nbytes / weight.numel()):.3f}", "stored": f"{stored:.3f}"}
                row |= {"rounds": len(found), "median_ms": f"{1e3 * middle:.4f}", "min_ms": f"{1e3 * found[0]:.4f}"}
                row |= {"gw_s": f"{weight.numel() / middle / 1e9:.1f}"}
                for other in ("Q4", "dense"):
                    row[f"times_{other}"] = f"{times[other][len(found) // 2] / middle:.2f}"
                    row[f"min_times_{other}"] = f"{times[other][0] / found[0]:.2f}"
                table.append(machine | row)
                print(*(f"{key} {value}" for key, value in row.items()), flush=True)
        write(RESULTS, table)


if __name__ == "__main__":
    main()
