"""Which backend runs a packed weight, and why each other one does not.

A named backend runs, or the load fails with the reason. `auto` takes the first row of the table that covers the weight
and whose backend can run here; where there is none, dense is what is known to be fastest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmsparse.backends import BACKENDS, WeightSpec
from llmsparse.backends.protocol import KnowsCopies
from llmsparse.backends.table import matching
from llmsparse.errors import MachineError, RecipeError, did_you_mean

AUTO = "auto"
UNPACKING = ("dense", "dense-lowmem")  # they can hand the whole weight over as well as multiply with it
OPTIMIZE = ("memory", "speed")


@dataclass(frozen=True)
class Choice:
    """What runs a weight. Beyond `tokens` tokens at once it is unpacked: at every call, or once into a dense copy."""

    weight: str
    asked: str  # auto, or the backend that was named
    optimize: str
    backend: str
    tokens: int | None  # None: any number
    because: str
    whole: bool  # as in WeightSpec
    packed_bytes: int
    dense_bytes: int
    refused: Mapping[str, str] = field(default_factory=dict[str, str])  # every other backend, and why

    @property
    def dense_copy(self) -> bool:
        """A dense copy is kept beside the packed weight."""
        return self.tokens is not None and self.optimize == "speed"


def check_names(backend: str, optimize: str) -> None:
    """RecipeError for a backend or a preference that does not exist."""
    if backend != AUTO and backend not in BACKENDS:
        raise RecipeError(f"backend {backend!r} is not known{did_you_mean(backend, [AUTO, *BACKENDS])}")
    if optimize not in OPTIMIZE:
        raise RecipeError(f"optimize {optimize!r}: choose memory or speed")


def why_not(backend: str, spec: WeightSpec) -> str | None:
    """Why a backend cannot run a weight here, in a few words; None if it can."""
    if spec.whole and backend not in UNPACKING:
        return "the module multiplies with this weight in a way of its own"
    formats = BACKENDS[backend].formats
    if formats is not None and spec.format not in formats:
        return f"for weights packed as {' or '.join(formats)}, this one is {spec.format}"
    return BACKENDS[backend].why_not(spec)


def limit_of(backend: str, spec: WeightSpec, optimize: str) -> int | None:
    """Up to how many tokens a backend beats what else would multiply: the weight unpacked, or for speed a dense copy."""
    one = BACKENDS[backend]
    limit = one.tokens(spec)
    if limit is None or optimize != "speed" or not isinstance(one, KnowsCopies):
        return limit
    return min(limit, one.tokens_beside_copy(spec))


def choose_backend(
    weight: str, spec: WeightSpec, packed_bytes: int, *, backend: str = AUTO, optimize: str = "memory"
) -> Choice:
    """What runs a weight called `weight`. MachineError where a named backend cannot run it here."""
    refused: dict[str, str] = {}
    chosen, tokens, because = "dense", None, "no backend is measured faster for this weight on this machine"
    if backend != AUTO:
        reason = why_not(backend, spec) or BACKENDS[backend].wrong(spec.device)
        if reason is not None:
            raise MachineError(f"backend {backend} cannot run {weight}: {reason}; use auto or dense")
        chosen, tokens, because = backend, limit_of(backend, spec, optimize), "asked for"
    else:
        for row in matching(spec):
            backend_of_row = BACKENDS.get(row.backend)
            if backend_of_row is None:
                refused[row.backend] = "unknown to this version"
                continue
            reason = why_not(row.backend, spec) or backend_of_row.wrong(spec.device)
            if reason is None:
                limit = limit_of(row.backend, spec, optimize)
                # beyond the row's tokens dense is faster, but only a dense copy is dense without being unpacked first
                tokens = min(limit, row.tokens) if limit is not None and optimize == "speed" else limit
                chosen = row.backend
                because = f"{row.speedup:g} × dense: {row.measured}"
                break
            refused[row.backend] = reason
    unwanted = f"not measured faster than {chosen}" if backend == AUTO else "another was asked for"
    for name in BACKENDS:
        if name != chosen and name not in refused:
            refused[name] = why_not(name, spec) or unwanted
    return Choice(
        weight, backend, optimize, chosen, tokens, because, spec.whole, packed_bytes, spec.dense_bytes, refused
    )
