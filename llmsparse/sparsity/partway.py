"""A pattern on the way from dense: what still stands while weights fade away."""

from __future__ import annotations

from dataclasses import replace

from llmsparse.sparsity.patterns import KeepingZeros, NofM, Pattern, Unstructured


def partway(pattern: Pattern, share: float) -> Pattern:
    """The pattern after `share` (0 to 1) of its zeros; each one's zeros are among those of the next where scores stay.

    N:M goes by whole steps of N: at half of the way 2:4 is 3:4.
    """
    if isinstance(pattern, KeepingZeros):
        return KeepingZeros(partway(pattern.pattern, share), pattern.zeros)
    if isinstance(pattern, Unstructured):
        return replace(pattern, sparsity=pattern.sparsity * share)
    if isinstance(pattern, NofM):
        left = pattern.m - round((pattern.m - pattern.n) * share)
        return NofM(left, pattern.m) if left < pattern.m else Unstructured(0.0, "matrix")
    raise AssertionError(f"no way from dense to {pattern}")
