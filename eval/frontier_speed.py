"""Time of the CPU that a token takes for a billion weights, of each way that `eval.frontier` stores them and a kernel multiplies with.

`python -m eval.frontier_speed [--shape 4096x11008] [--seconds 30]` writes eval/results/frontier_speed.csv: one token, one thread,
normal weights rounded to the nearest, by turns in one run, on pages of 2 MB, as many copies of each as are twice the L3 cache.

    quantize                   at bits that are stored
    mask                       bf16 values under a bit for each weight
    mask-int8, mask-int4       numbers under a mask, a step a row and every 128 columns
    gptq                       4 bits with a scale for 32 columns, by eval/q4_gemv.c, as llama.cpp's Q4_0: stands for plain 4 bits
    dense                      eval/dense_gemv.c, bf16

`activations`: bf16, or 8 bits, which are made of bf16 in the time that is told. `eval.frontier_figure` sets the perplexities beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.cpu_speed import Copies, compiler_version, cpu_name, dense_loop, measure
from eval.nested_speed import copied, nested_of, q4_loop, q4_of
from eval.table import write
from llmsparse.backends import cpu
from llmsparse.backends.cpu import nested, pages
from llmsparse.formats.bitmask import Bitmask
from llmsparse.formats.nested import Nested
from llmsparse.packing.values import coded_values
from llmsparse.quantization.search import step_for

RESULTS = Path(__file__).parent / "results" / "frontier_speed.csv"
BITS = (2.0, 2.3, 2.7, 3.0, 3.5, 4.0)
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
VALUES = ((0.7, "int8"), (0.7, "int4"), (0.5, "int4"))


@dataclass(frozen=True)
class Variant:
    """One way to multiply with a weight."""

    method: str
    setting: str
    activations: str
    bits: float  # in memory
    run: Callable[[], Tensor]

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting} {self.activations}"


def bits_of(packed: Nested) -> float:
    return 8 * sum(tensor.nbytes for tensor in packed.tensors().values()) / packed.shape[0] / packed.shape[1]


def masked(weight: Tensor, sparsity: float) -> Tensor:
    """Without its smallest."""
    least = weight.abs().flatten().kthvalue(round(sparsity * weight.numel())).values
    return weight.where(weight.abs() > least, 0).bfloat16()


def of_numbers(method: str, setting: str, packed: Nested, x: Tensor) -> Iterator[Variant]:
    for activations, int8 in (("bf16", False), ("8 bits", True)):
        few = nested.prepare(packed, int8=int8)
        copies = Copies(few.nbytes, lambda few=few: copied(few))
        bits = 8 * few.nbytes / packed.shape[0] / packed.shape[1]
        yield Variant(
            method, setting, activations, bits, lambda c=copies, int8=int8: nested.matvec(c.next(), x, int8=int8)
        )


def variants(weight: Tensor, x: Tensor) -> Iterator[Variant]:
    for bits in BITS:

        def attempt(step: float) -> tuple[float, Nested]:
            made = nested_of(weight[:256], step)
            return bits_of(made), made

        step = step_for(bits, attempt, 1.2, least=0.05, most=4).step
        yield from of_numbers("quantize", f"{bits:g}", nested_of(weight, step), x)
    for sparsity in SPARSITIES:
        sparse = cpu.prepare(Bitmask.pack(masked(weight, sparsity), "unstructured"))
        masks = Copies(sparse.nbytes, lambda s=sparsity: cpu.prepare(Bitmask.pack(masked(weight, s), "unstructured")))
        bits = 8 * sparse.nbytes / weight.numel()
        yield Variant("mask", f"{sparsity:g}", "bf16", bits, lambda masks=masks: cpu.matvec(masks.next(), x))
    for sparsity, values in VALUES:
        yield from of_numbers(f"mask-{values}", f"{sparsity:g}", coded_values(masked(weight, sparsity), values), x)
    (values, scales, _), q4, dense = q4_of(weight), q4_loop(), dense_loop()
    assert dense is not None
    fours = Copies(values.nbytes + scales.nbytes, lambda: (pages.copy(values), pages.copy(scales)))
    bits = 8 * fours.bytes / weight.numel()
    yield Variant("gptq", "4 g32", "8 bits", bits, lambda: q4(*fours.next(), x))
    halves = Copies(2 * weight.numel(), lambda: pages.copy(weight.bfloat16()))
    yield Variant("dense", "", "bf16", 16.0, lambda: dense(x, halves.next()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x11008")
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    out, width = map(int, options.shape.split("x"))
    weight, x = torch.randn(out, width), torch.randn(1, width).bfloat16()
    made = list(variants(weight, x))
    times = measure({variant.name: variant.run for variant in made}, options.seconds)
    dense = times[made[-1].name]
    rows: list[dict[str, Any]] = []
    for variant in made:
        found = times[variant.name]
        middle, least = found[len(found) // 2], found[0]
        row: dict[str, Any] = {"cpu": cpu_name(), "torch": torch.__version__, "compiler": compiler_version()}
        row |= {"out": out, "in": width, "method": variant.method, "setting": variant.setting}
        row |= {"activations": variant.activations, "bits": f"{variant.bits:.3f}", "rounds": len(found)}
        row |= {"ms": f"{1e12 * middle / weight.numel():.2f}", "ms_min": f"{1e12 * least / weight.numel():.2f}"}
        rows.append(
            row | {"over_dense": f"{middle / dense[len(found) // 2]:.3f}", "over_dense_min": f"{least / dense[0]:.3f}"}
        )
        print(*(f"{key} {value}" for key, value in list(rows[-1].items())[5:]), flush=True)
    write(RESULTS, rows)


if __name__ == "__main__":
    main()
