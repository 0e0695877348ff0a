"""Measure dense and every backend side by side on the weights and mixtures of a model, and say where there is no gain."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llmsparse.backends import BACKENDS, WeightSpec, table
from llmsparse.backends.choice import AUTO, check_names
from llmsparse.backends.table import Measurement, device_kinds
from llmsparse.benchmark.checked import laid_out
from llmsparse.benchmark.decoding import Decoding, decode
from llmsparse.benchmark.mixtures import STOCK, MixtureWorkload, dense_source, has_experts, mixtures, time_mixture
from llmsparse.benchmark.report import DENSE, GAIN, Benchmark, Measured, MixtureMeasured, Speed, Speeds
from llmsparse.benchmark.timing import cache_bytes, copies_for, copy_bandwidth, current, side_by_side
from llmsparse.benchmark.workloads import Workload, of_model, of_shapes
from llmsparse.errors import CheckpointError, LlmsparseError, MachineError, RecipeError
from llmsparse.inference.fused_experts import NAME
from llmsparse.inference.load import load_model
from llmsparse.models.origin import fetch_model, is_packed, read_config
from llmsparse.models.thresholds import block_of
from llmsparse.runs.device import DTYPES, choose_device
from llmsparse.runs.progress import Progress, Silent
from llmsparse.version import __version__

ALL = "all"
SECONDS = 1.0  # for each weight and batch
BATCHES = (1, 2, 4, 8, 16, 32)
DECODE_TOKENS = 48
SLACK = 0.02  # a row of the table holds from so much less sparsity than was measured


def bench(
    model: str | None = None,
    *,
    shapes: str | None = None,
    sparsity: float = 0.7,
    pattern: str = "unstructured",
    dtype: str = "bfloat16",
    batches: Sequence[int] = BATCHES,
    device: str = "auto",
    backend: str = ALL,
    seconds: float = SECONDS,
    end_to_end: bool = True,
    save: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure the distinct weights of `model` (a pruned or packed folder, or hub id), its mixtures of dense experts and
    its decoding unless not `end_to_end`; or synthetic weights of `shapes`, a name of workloads.SHAPES or `OUTxIN,...`, at
    `sparsity` or N:M.

    `save` puts what is faster than dense into the table that `auto` reads, and takes out what is not. MachineError for
    a named backend that can run none of the weights, CheckpointError for a model that is dense.
    """
    if (model is None) == (shapes is None):
        raise RecipeError("bench measures a MODEL or --shapes: give one of the two")
    if not batches or min(batches) < 1:
        raise RecipeError(f"--batch {','.join(map(str, batches))}: wanted numbers of 1 and more")
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype!r}: choose float32, bfloat16 or float16")
    if backend != ALL:
        check_names(backend, "memory")
    progress, place = progress or Silent(), choose_device(device)
    names = list(BACKENDS) if backend == ALL else list(dict.fromkeys((DENSE, backend)))
    folder = None if model is None else fetch_model(model, revision)
    mixed: list[MixtureWorkload] = []
    cut = folder is not None and block_of(read_config(folder)) is not None
    if folder is not None:
        if backend == ALL and _is_mixture(folder, trust_remote_code):
            experts = AUTO if cut else STOCK[0]
            loaded = load_model(folder, device=place, experts=experts, trust_remote_code=trust_remote_code)
            mixed = mixtures(loaded, max(batches))
        try:
            workloads = of_model(folder, trust_remote_code, progress)
        except CheckpointError:
            if not mixed:
                if cut and _is_mixture(folder, trust_remote_code):
                    raise RecipeError(
                        f"{model}: nothing to measure: its experts leave inputs out, and run one by one, in one way only; measure "
                        "the model that it was made of, or time `llmsparse generate`"
                    ) from None
                raise
            workloads = []  # nothing but dense experts
    else:
        workloads = of_shapes(str(shapes), sparsity, pattern, DTYPES[dtype])
    cache = cache_bytes(place)
    bandwidth = copy_bandwidth(place, cache)
    measured: list[Measured] = []
    mixed_measured: list[MixtureMeasured] = []
    sizes = sorted(set(batches))
    with progress, current(place):
        progress.start(len(workloads) + len(mixed))
        for workload in workloads:
            progress.block(workload.name)
            measured.append(time_weight(workload, names, sizes, place, cache, bandwidth, seconds))
        for mixture in mixed:
            progress.block(mixture.name)
            mixed_measured.append(time_mixture(mixture, sizes, place, bandwidth, seconds))
    if backend != ALL and all(backend in one.refused for one in measured):
        raise MachineError(f"backend {backend} cannot run here: {measured[0].refused[backend]}")
    protocol = _protocol(place, cache, bandwidth, seconds)
    result = Benchmark(model or str(shapes), protocol, versions(place), measured, mixed_measured)
    if folder is not None and end_to_end:
        decodings, reason = _end_to_end(folder, result, str(place), backend)
        result = dataclasses.replace(result, decodings=decodings, not_decoded=reason)
    if save:
        faster, lost = rows(result, place)
        result = dataclasses.replace(result, saved=str(table.save(faster, lost)), saved_rows=len(faster))
    return result


def time_weight(
    workload: Workload,
    names: Sequence[str],
    batches: Sequence[int],
    device: torch.device,
    cache: int,
    bandwidth: float,
    seconds: float,
) -> Measured:
    """One weight, on every backend that can run it and is right, and for every batch that this one takes."""
    packed = workload.packed.moved(device)
    spec = WeightSpec.of(packed)
    packed_bytes = sum(tensor.nbytes for tensor in packed.tensors().values())
    sizes = {name: spec.dense_bytes if name == DENSE else packed_bytes for name in names}
    refused: dict[str, str] = {}
    prepared: dict[str, list[Any]] = {}
    for name in names:
        found = laid_out(name, packed, spec, copies_for(sizes[name], cache), batches)
        if isinstance(found, str):
            refused[name] = found
            del sizes[name]
        else:
            prepared[name] = found
    limits = {name: BACKENDS[name].tokens(spec) for name in sizes}
    tables: list[Speeds] = []
    for batch in batches:
        x = torch.randn(batch, spec.shape[-1], dtype=spec.dtype, device=device)  # (batch, in)
        too_many = {
            name: f"for up to {most} at once" for name, most in limits.items() if most is not None and batch > most
        }
        calls = {
            name: [partial(BACKENDS[name].run, copy, x, None) for copy in copies]
            for name, copies in prepared.items()
            if name not in too_many
        }
        times = side_by_side(calls, device, seconds)
        speeds = [
            Speed(
                name,
                time_taken,
                times[DENSE].median / time_taken.median,
                sizes[name] / time_taken.median / 1e9,
                sizes[name] / time_taken.median / bandwidth,
                len(prepared[name]) * sizes[name] > 2 * cache,
            )
            for name, time_taken in times.items()
        ]
        tables.append(Speeds(batch, speeds, too_many))
    dtype = str(spec.dtype).removeprefix("torch.")
    out, width = spec.shape
    return Measured(
        workload.name, workload.count, (out, width), dtype, spec.pattern, spec.sparsity, spec.dense_bytes, packed_bytes,
        refused, limits, tables,
    )  # fmt: skip


def rows(result: Benchmark, device: torch.device) -> tuple[list[Measurement], list[Measurement]]:
    """For the table of backends: what is faster than dense, the fastest first; and what was measured and is not.

    A backend is faster up to the largest batch before the first at which it gains less than GAIN. One that takes any
    number of tokens would be given any number, and so must gain at every batch. One that rounds is left to be asked for.
    """
    about = f"{time.strftime('%Y-%m-%d')} on {result.protocol['device']}, {result.protocol['threads']} threads, "
    about += ", ".join(f"{name} {number}" for name, number in result.versions.items() if number)
    faster: list[tuple[float, Measurement]] = []
    lost: list[Measurement] = []
    for one in result.measured:
        spans: dict[str, Any] = {"rows": (one.shape[0],) * 2, "columns": (one.shape[1],) * 2}
        spans["sparsity"] = (max(0.0, round(one.sparsity - SLACK, 2)), 1.0)
        for name in BACKENDS:
            speedups = [(speeds.batch, speeds.speedup(name)) for speeds in one.tables]
            if name == DENSE or not BACKENDS[name].exact or not speedups or speedups[0][1] is None:
                continue
            won = [(batch, gain or 0.0) for batch, gain in speedups]
            end = next((number for number, (_, gain) in enumerate(won) if gain < GAIN), len(won))
            if end < len(won) and one.limits[name] is None:
                end = 0
            tokens, least = (won[end - 1][0], min(gain for _, gain in won[:end])) if end else (0, won[0][1])
            row = Measurement(
                name, device_kinds(device)[0], one.dtype, one.pattern, **spans, tokens=tokens, speedup=round(least, 2),
                measured=about,
            )  # fmt: skip
            if end:
                faster.append((won[0][1], row))
            else:
                lost.append(row)
    return [row for _, row in sorted(faster, key=lambda pair: -pair[0])], lost


def versions(device: torch.device) -> dict[str, str | None]:
    """Of all that can change a time."""
    found: dict[str, str | None] = {"llmsparse": __version__, "torch": torch.__version__}
    for package in ("transformers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        available = torch.backends.cusparselt.is_available()
        found["cusparselt"] = str(torch.backends.cusparselt.version()) if available else None
    return found


def _protocol(device: torch.device, cache: int, bandwidth: float, seconds: float) -> dict[str, Any]:
    cpu = next((line.partition(":")[2].strip() for line in table.cpu_info() if line.startswith("model name")), "cpu")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "kind": device_kinds(device)[0],
        "threads": torch.get_num_threads(),
        "threads_bound": os.environ.get("OMP_PROC_BIND", "false").lower() not in ("", "false"),
        "cache_bytes": cache,
        "copy_gb_per_second": bandwidth / 1e9,
        "seconds_per_cell": seconds,
        "timed": "CUDA graph, events" if device.type == "cuda" else "wall clock of each call",
    }


def _is_mixture(folder: Path, trust_remote_code: bool) -> bool:
    return not is_packed(read_config(folder)) and has_experts(folder, trust_remote_code)


def _end_to_end(folder: Path, result: Benchmark, device: str, backend: str) -> tuple[list[Decoding], str | None]:
    """Decoding, dense beside the backend that was named, or the one that is fastest at the smallest batch over all
    weights; or, of mixtures, the model that they were made from beside each way to run them. And why there is none."""
    model, best = str(folder), result.fastest() if backend == ALL else backend
    runs: dict[str, list[str]] = {}
    if result.mixtures:
        dense = dense_source(folder)
        runs = {} if dense is None else {DENSE: [dense]}
        runs |= {name: [model, "--experts", name] for name in (STOCK[0], NAME)}
    else:
        runs[DENSE] = [model, "--backend", DENSE if is_packed(read_config(folder)) else "auto"]
    if best is not None and best != DENSE:
        runs[best] = [model, "--backend", best]
    try:
        return decode(runs, device=device, tokens=DECODE_TOKENS), None
    except LlmsparseError as error:
        return [], str(error)
