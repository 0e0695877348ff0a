"""The token that marks a beginning (BOS): before every text, before the first one, or nowhere.

A tokenizer puts it where its model was trained to find it, as far as it knows; recipes of others may have put it elsewhere.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmsparse.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["each", "once", "none"]


class Special(NamedTuple):
    """Ids that a text gets before and behind it."""

    before: list[int]
    after: list[int]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Special | None:
    """What the tokenizer puts around a text; None if its ids do not show it."""
    whole: Any = tokenizer("a", verbose=False)["input_ids"]
    plain: Any = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return Special(whole[:begin], whole[begin + len(plain) :])
    return None


def special_with(tokenizer: PreTrainedTokenizerBase, bos: bool) -> Special:
    """The same with a BOS before the text, or without one, whatever the tokenizer does by itself.

    CalibrationError for a tokenizer that has none, or that does not show what it does.
    """
    special = special_tokens(tokenizer)
    mark: Any = getattr(tokenizer, "bos_token_id", None)
    if special is None or (bos and mark is None):
        why = "has no BOS token" if special else "does not show which tokens it puts around a text"
        raise CalibrationError(f"--bos: tokenizer {tokenizer.name_or_path} {why}; leave --bos out, or give none")
    before = [token for token in special.before if token != mark]
    return Special([*([mark] if bos and mark is not None else []), *before], special.after)


def begins(bos: Bos | None, first: bool) -> bool | None:
    """Whether a text gets a BOS; None where the tokenizer decides."""
    return None if bos is None else bos == "each" or (bos == "once" and first)
