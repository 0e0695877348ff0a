"""Speed of the GPU kernels beside dense and cuSPARSELt in the same run: first checked, then timed.

`python -m eval.kernels [--out FOLDER] [--shapes 4096x14336] [--tokens 1,8] [--kernels dense,mma24] [--plans] [--dry-run]`

For each shape (N×K) and number of tokens M: bf16, the product alone, in a CUDA graph that runs over enough copies of the
weight that none is still in the cache; kernels by turns, round by round, after a round to warm up. Reported are the median
and the 20th and 80th percentile over rounds of the time of one product, the ratio to dense, and GB/s of what has to be
read and written against the copy bandwidth that the device reached in this run. A kernel whose error against float64
exceeds 1.2 × dense's own is reported as wrong and not timed. Weights are random: 2:4, or zeros anywhere for the kernels
of unstructured weights: 70 %, or what their name ends in; all of these stand beside `dense-70`. `--plans` times `mma24`
cut in other ways, too, x put in order first (+pack_x) among them.

Needs torch and triton alone. Writes kernels.csv into `--out`, by default eval/results. Never yet run on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from triton_ops import mma24
from triton_ops.mask24 import mask24
from triton_ops.mma24_kernel import run
from triton_ops.mma24_plan import Plan, plan

RESULTS = Path(__file__).parent / "results"
SHAPES = ("4096x14336", "28672x8192", "4096x4096")
TOKENS = (1, 8, 16, 32)
KERNELS = {  # name → what kind of weight it takes; `dense` is timed on both
    "dense": "2:4",
    "cusparselt": "2:4",
    "mma24": "2:4",
    "select24": "2:4",
    "join24": "2:4",
    "dense-70": "70%",
    "split24": "70%",
} | {f"{kernel}-{percent}": f"{percent}%" for kernel in ("bitmask", "sell") for percent in (50, 60, 70, 80)}
CACHE_BYTES = 400e6  # weights that a round reads, at least: three times the largest cache, a B200's 126 MB
ROUNDS = 50

Product = Callable[[Tensor], Tensor]


@dataclass
class Row:
    """A line of kernels.csv."""

    device: str
    torch: str
    triton: str
    cusparselt: str
    shape: str
    tokens: int
    kernel: str
    microseconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    vs_dense: float | None = None
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    error: float | None = None  # relative, against float64
    dense_error: float | None = None
    note: str = ""  # why there is no time


def variants(m: int, plans: bool) -> dict[str, Plan]:
    """Other ways to cut `mma24` for M tokens: name → plan, parts still to be set from the shape."""
    if not plans:
        return {}
    found = dict[str, Plan]()
    for tiles, warps, group, direct in itertools.product((1, 2), (4, 8), (2, 4), (True, False)):
        if direct and m > 8:
            continue
        name = f"mma24 {tiles}·{warps}·{group}" + ("" if direct else " +pack_x")
        found[name] = Plan(tiles, warps, group, direct, 1)
    return found


def build(name: str, weight: Tensor, cut: Plan | None = None) -> tuple[Product, int]:
    """The product x → x·Wᵀ of a kernel, and the bytes of the weight that it reads."""
    if name.startswith("dense"):
        return lambda x: linear(x, weight), weight.nbytes
    if name == "cusparselt":
        sparse: Any = torch.sparse.to_sparse_semi_structured(weight)
        return lambda x: linear(x, sparse), weight.nbytes * 9 // 16
    if cut is not None:
        packed = mma24.prepare(weight)

        def product(x: Tensor) -> Tensor:
            y = x.new_empty(len(x), weight.shape[0])
            run(x, packed.vals, packed.meta, None, y, cut)
            return y

        return product, packed.vals.nbytes + packed.meta.nbytes
    kernel = module_of(name)
    prepared = kernel.prepare(weight)
    return lambda x: kernel.linear(x, prepared), sum(tensor.nbytes for tensor in tensors(prepared))


def tensors(prepared: object) -> Iterator[Tensor]:
    if isinstance(prepared, Tensor):
        yield prepared
    elif isinstance(prepared, tuple):
        for part in prepared:
            yield from tensors(part)


def module_of(name: str) -> ModuleType:
    """`sell-70` is the kernel of triton_ops/sell.py at 70 % sparsity."""
    return import_module(f"triton_ops.{name.split()[0].split('-')[0]}")


def why_not(name: str, n: int, k: int, m: int, device: torch.device) -> str | None:
    if name.startswith("dense"):
        return None
    if name == "cusparselt":
        return None if torch.backends.cusparselt.is_available() else "this torch has no cuSPARSELt"
    return module_of(name).why_not((n, k), torch.bfloat16, device, m)


def random_weight(kind: str, n: int, k: int, device: torch.device) -> Tensor:
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    keep = mask24(weight) if kind == "2:4" else torch.rand(n, k, device=device) > float(kind.rstrip("%")) / 100
    return weight.masked_fill(~keep, 0)


def graph_of(products: list[Product], x: Tensor) -> torch.cuda.CUDAGraph:
    """One graph that runs each product once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for product in products:
                product(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)
    return graph


def time_once(run: Callable[[], object]) -> float:
    """Microseconds on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def copy_bandwidth(device: torch.device) -> float:
    """GB/s, read and write together, of a copy of 1 GiB."""
    source = torch.ones(1 << 28, device=device)
    target = torch.empty_like(source)
    times = [time_once(lambda: target.copy_(source)) for _ in range(20)]
    return 2 * source.nbytes / statistics.median(times) / 1e3


def measure(shape: str, m: int, names: list[str], plans: bool, rounds: int, base: dict[str, Any]) -> list[Row]:
    """All kernels for one shape and number of tokens."""
    (n, k), device = map(int, shape.split("x")), torch.device("cuda")
    torch.manual_seed(0)
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    copies = max(2, -(-int(CACHE_BYTES) // (n * k)))  # a packed weight has at least a byte for each two
    weights = {kind: random_weight(kind, n, k, device) for kind in set(KERNELS.values())}
    errors = {kind: error_of(linear(x, weight), x, weight) for kind, weight in weights.items()}
    rows, graphs = list[Row](), dict[str, tuple[torch.cuda.CUDAGraph, Row, int]]()
    other = variants(m, plans)
    for name in [*names, *other]:
        kind = KERNELS[name.split()[0]]
        row = Row(shape=shape, tokens=m, kernel=name, dense_error=errors[kind], **base)
        rows.append(row)
        row.note = why_not(name, n, k, m, device) or ""
        if row.note:
            continue
        try:
            cut = other[name]._replace(parts=plan(n, k, m).parts) if name in other else None
            built = [build(name, weights[kind].clone(), cut) for _ in range(copies)]
            row.error = error_of(built[0][0](x), x, weights[kind])
            if not row.error <= 1.2 * errors[kind]:  # NaN too
                row.note = f"wrong: error {row.error:.1e}, dense has {errors[kind]:.1e}"
                continue
            graphs[name] = graph_of([product for product, _ in built], x), row, built[0][1]
        except Exception as error:  # one kernel that fails leaves the others' figures
            row.note = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    times = {name: list[float]() for name in graphs}
    for _ in range(1 + rounds):  # the first warms up
        for name, (graph, *_) in graphs.items():
            times[name].append(time_once(graph.replay) / copies)
    for name, (_, row, weight_bytes) in graphs.items():
        row.p20, *_, row.p80 = statistics.quantiles(times[name][1:], n=5)
        row.microseconds = statistics.median(times[name][1:])
        row.gb_per_s = (weight_bytes + 2 * m * (n + k)) / row.microseconds / 1e3
        dense = "dense" if KERNELS[name.split()[0]] == "2:4" else "dense-70"
        if dense in graphs:
            row.vs_dense = statistics.median(times[dense][1:]) / row.microseconds
    return rows


def error_of(y: Tensor, x: Tensor, weight: Tensor) -> float:
    wanted = x.double() @ weight.double().T
    return float((y.double() - wanted).norm() / wanted.norm())


def show(row: Row) -> None:
    if row.note:
        print(f"{row.shape:>12} M={row.tokens:<3} {row.kernel:<24} {row.note}")
        return
    versus = "" if row.vs_dense is None else f"{row.vs_dense:5.2f} × dense"
    print(
        f"{row.shape:>12} M={row.tokens:<3} {row.kernel:<24} {row.microseconds:8.1f} µs ({row.p20:.1f}–{row.p80:.1f}) "
        f"{versus:>14} {row.gb_per_s:7.0f} GB/s of {row.copy_gb_per_s:.0f}"
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--shapes", default=",".join(SHAPES), type=lambda text: text.split(","))
    parser.add_argument(
        "--tokens", default=",".join(map(str, TOKENS)), type=lambda text: list(map(int, text.split(",")))
    )
    parser.add_argument("--kernels", default=",".join(KERNELS), type=lambda text: text.split(","))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.kernels if name not in KERNELS]
    if unknown:
        parser.error(f"unknown kernel {unknown[0]!r}; known: {', '.join(KERNELS)}")
    if any(len(shape.split("x")) != 2 or not shape.replace("x", "").isdigit() for shape in options.shapes):
        parser.error(f"a shape is NxK, got {','.join(options.shapes)}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    cells = [(shape, m) for shape in options.shapes for m in options.tokens]
    if options.dry_run:
        for shape, m in cells:
            n, k = map(int, shape.split("x"))
            cut = f"mma24 {plan(n, k, m)}" if m <= mma24.MOST_TOKENS else ""
            print(f"{shape:>12} M={m:<3} {', '.join([*options.kernels, *variants(m, options.plans)])}; {cut}")
        return 0
    if not torch.cuda.is_available():
        print("eval.kernels needs a CUDA device; --dry-run shows what would be timed", file=sys.stderr)
        return 3
    lt = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else "none"
    base = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    base |= {"cusparselt": str(lt), "copy_gb_per_s": copy_bandwidth(torch.device("cuda"))}
    print(", ".join(f"{key} {value}" for key, value in base.items()))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "kernels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for shape, m in cells:
            for row in measure(shape, m, options.kernels, options.plans, options.rounds, base):
                show(row)
                writer.writerow(asdict(row))
            file.flush()
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
