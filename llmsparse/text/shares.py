"""Several texts, and how much of each: `c4@2` beside `code.jsonl@1` is two windows of C4 for each one of the file.

What stands behind the last @ is a weight, unless it ends as files of text do: `me@home.txt` is a file, and
`me@home.txt@3` three shares of it. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from llmsparse.errors import CalibrationError
from llmsparse.text.kinds import is_file_name, is_token_file

Sources = str | Sequence[str]  # one text, or several with their weights
WEIGHT = re.compile(r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]{1,3})?", re.IGNORECASE)


LEAST, MOST = 1e-100, 1e100  # of a weight, so that sums and products of some are numbers


def is_weight(value: Any) -> bool:
    return type(value) in (int, float) and LEAST <= value <= MOST


class Share(NamedTuple):
    """A text as `open_texts` takes it, and its weight among others."""

    source: str
    weight: float = 1.0


def split_share(text: str) -> Share:
    """`c4@2` → ("c4", 2.0), `c4` → ("c4", 1.0). CalibrationError for a weight that is no positive number."""
    source, at, weight = text.rpartition("@")
    if not at or is_file_name(weight):
        return Share(text)
    value = float(weight) if WEIGHT.fullmatch(weight) else 0.0
    if not source or not is_weight(value):
        most = f" up to {MOST:g}" if value > 1 else ""
        raise CalibrationError(
            f"{text}: got {weight!r} behind @, wanted the weight of a text, a positive number{most}, as in c4@2"
        )
    return Share(source, value)


def split_shares(sources: Sources) -> list[Share]:
    """Every text with its weight. CalibrationError as of `split_share`, and for a text that is named twice."""
    shares = [split_share(text) for text in ([sources] if isinstance(sources, str) else sources)]
    names = [share.source for share in shares]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CalibrationError(f"{twice} is named twice; name it once, with the weight of both, as in {twice}@2")
    return shares


def holds_tokens(sources: Sources) -> bool:
    """Whether one of them is a file of stored tokens, which says itself how long a window is."""
    return any(is_token_file(share.source) for share in split_shares(sources))


def spell_sources(sources: Sources) -> str:
    return sources if isinstance(sources, str) else ", ".join(sources)


def apportion(windows: int, shares: Sequence[Share]) -> list[int]:
    """`windows` divided by weight, by the largest remainder; of equal remainders the first is rounded up.

    CalibrationError for a text of which that is no window.
    """
    total = sum(share.weight for share in shares)
    exact = [windows * share.weight / total for share in shares]
    counts = [math.floor(part) for part in exact]
    largest = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in largest[: windows - sum(counts)]:
        counts[index] += 1
    for share, count in zip(shares, counts, strict=True):
        if count == 0:
            raise CalibrationError(
                f"{share.source}: a weight of {share.weight:g} in {total:g} is none of {windows} windows; give it more "
                "weight, or more --calibration-samples"
            )
    return counts
