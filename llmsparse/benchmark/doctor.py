"""What this machine can run: versions, devices, each backend and fused experts, usable or why not. Loads no model."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, cast

import torch

from llmsparse.backends import BACKENDS, WeightSpec, cpu
from llmsparse.backends.cpu import dense, pages
from llmsparse.backends.table import SHIPPED, cpu_info, device_kinds, read, shipped, user_file
from llmsparse.inference.fused_experts import kernel_name, most_tokens, unusable
from llmsparse.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

PACKAGES = ("torch", "transformers", "triton", "safetensors", "accelerate")
CPU = torch.device("cpu")
SHAPE = (4096, 4096)  # of the weight that backends are asked about, in bfloat16


@dataclass(frozen=True)
class Device:
    """A CPU or a GPU."""

    name: str
    kinds: tuple[str, ...]  # as the table of backends calls it
    memory_bytes: int
    details: str


@dataclass(frozen=True)
class Usable:
    """A backend here."""

    name: str
    device: str
    refused: str | None  # why it cannot run; None: usable
    details: str


@dataclass(frozen=True)
class Diagnosis:
    """What `llmsparse doctor` shows."""

    versions: dict[str, str | None]
    devices: list[Device]
    backends: list[Usable]
    experts: list[Usable]  # fused, one for each device
    measured: dict[str, int]  # file of measured speeds → rows

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        devices = Table("device", "table name", "GB", "details", box=None, pad_edge=False)
        for device in self.devices:
            size = f"{device.memory_bytes / 1e9:.1f}"
            devices.add_row(device.name, " or ".join(device.kinds), size, device.details)
        backends = Table("backend", "on", "", "", box=None, pad_edge=False)
        for backend in (*self.backends, *self.experts):
            usable = ("usable", backend.details) if backend.refused is None else ("no", backend.refused)
            backends.add_row(backend.name, backend.device, *usable)
        installed = ", ".join(f"{name} {number or 'missing'}" for name, number in self.versions.items())
        speeds = "\n".join(f"{rows} measured speeds in {file}" for file, rows in self.measured.items())
        return Group(installed, "", devices, "", backends, "", speeds)


def diagnose() -> Diagnosis:
    """Look at this machine. The CPU kernels are compiled if they have never been."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    versions = {"llmsparse": __version__, "python": platform.python_version()}
    measured = {str(file): len(rows) for file, rows in ((SHIPPED, shipped()), (user_file(), read(user_file())))}
    return Diagnosis(
        versions | {name: _version(name) for name in PACKAGES},
        [_cpu(), *map(_gpu, gpus)],
        [_usable(name, (gpus or [CPU])[0]) for name in BACKENDS],
        [_fused(device) for device in (CPU, *gpus)],
        measured,
    )


def _usable(name: str, device: torch.device) -> Usable:
    backend = BACKENDS[name]
    pattern = getattr(backend, "pattern", None) or ("2:4" if name == "cusparselt" else "unstructured")
    place = CPU if name.startswith("cpu-") else device
    spec = WeightSpec(SHAPE, pattern, SHAPE[0] * SHAPE[1] // 2, torch.bfloat16, place)
    refused = backend.why_not(spec) or backend.wrong(place)
    details = ""
    if refused is None and name in ("cpu-bitmask", "cpu-dense"):
        bfloat16 = torch.bfloat16
        kernels = cpu.kernels(bfloat16, bfloat16) if name == "cpu-bitmask" else dense.kernels(bfloat16)
        details = f"kernels: {', '.join(kernels)}"
    return Usable(name, str(place), refused, details)


def _fused(device: torch.device) -> Usable:
    refused = unusable(device, torch.bfloat16)
    details = ""
    if refused is None:
        kernel = kernel_name(torch.bfloat16) if device.type == "cpu" else "expert_gemv"
        details = f"fused, kernel {kernel}, for up to {most_tokens(device, torch.bfloat16)} tokens at once"
    return Usable("experts", str(device), refused, details)


def _cpu() -> Device:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    names = (line.partition(":")[2].strip() for line in cpu_info() if line.startswith("model name"))
    plain = pages.why_not()
    lie = "weights on 2 MB pages" if plain is None else f"weights on plain pages: {plain}"
    return Device(
        next(names, platform.processor() or platform.machine()),
        device_kinds(CPU),
        memory,
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {lie}",
    )


def _gpu(device: torch.device) -> Device:
    about = cast(Any, torch.cuda).get_device_properties(device)
    details = f"CUDA {torch.version.cuda}, {about.multi_processor_count} multiprocessors"
    return Device(str(device), device_kinds(device), about.total_memory, details)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
