"""A C library of kernels: built and loaded once in a process, or the reason why it cannot be."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_void_p
from functools import cached_property
from pathlib import Path
from typing import Any

from llmsparse.backends.cpu.build import BuildError, load, openmp_runtime
from llmsparse.errors import MachineError

HERE = Path(__file__).parent
TEAM = {"use_team": (None, (c_void_p, c_void_p, c_void_p))}

Signatures = Mapping[str, tuple[Any, tuple[Any, ...]]]  # function → (result, arguments)


class KernelLibrary:
    """`sources` include team.h, and their `kernel_name` and `kernel_fits` number the kernels, the fastest first."""

    def __init__(self, name: str, sources: tuple[str, ...], signatures: Signatures) -> None:
        self._name, self._signatures = name, {**signatures, **TEAM}
        self.sources = tuple(HERE / source for source in sources)

    def why_not(self) -> str | None:
        """Why it cannot run here, in one line; None if it can. Builds it at the first call."""
        return self._found if isinstance(self._found, str) else None

    def loaded(self) -> ctypes.CDLL:
        """The library. MachineError with the reason where there is none."""
        if isinstance(self._found, str):
            raise MachineError(f"the {self._name} cannot run here: {self._found}")
        return self._found

    def fitting(self, *dtypes: int) -> dict[str, int]:
        """Name → number of the kernels that this CPU can run on `dtypes` (enum of floats.h). MachineError as of `loaded`."""
        c, found, number = self.loaded(), dict[str, int](), 0
        while name := c.kernel_name(number):
            if c.kernel_fits(number, *dtypes):
                found[name.decode()] = number
            number += 1
        return found

    @cached_property
    def _found(self) -> ctypes.CDLL | str:
        try:
            c = load(*self.sources)
        except BuildError as error:
            return str(error)
        for name, (result, arguments) in self._signatures.items():
            function = getattr(c, name)
            function.restype, function.argtypes = result, arguments
        runtime = openmp_runtime()
        if runtime is not None:  # torch's threads; without it, one
            team = (runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads)
            c.use_team(*(ctypes.cast(function, c_void_p) for function in team))
        return c
