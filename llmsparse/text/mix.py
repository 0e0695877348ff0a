"""Windows of several texts in the shares that were asked for, in seeded order, and held-out windows of each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsparse.errors import CalibrationError
from llmsparse.text.bos import Bos
from llmsparse.text.kinds import SELF, has_columns, is_file_name, is_token_file
from llmsparse.text.own_text import Starts, Unwritten, own_protocol
from llmsparse.text.shares import Share, Sources, apportion, split_shares
from llmsparse.text.sources import Purpose
from llmsparse.text.windows import DEFAULT_SEQ_LEN, Windows, load_windows, stored_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_HELD_OUT = 8  # windows to measure on of each text of a mix


def load_mix(
    sources: Sources,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seq_len: int | None,
    samples: int,
    seed: int,
    held_out: int = 0,
    text_field: str | None = None,
    vocabulary: int | None = None,
    starts: Starts | None = None,
    purpose: Purpose = "calibration",
    bos: Bos | None = None,
) -> Windows:
    """`load_windows` of one text; of several, windows of each in its share, shuffled by the seed.

    `held_out` windows are then divided between the texts, eight of each at least, one text after the other
    (`Windows.held_out_of`). A column is looked for where there are columns. `starts` is how the model begins a text, for
    windows that it is to write.
    CalibrationError, beside what `load_windows` refuses, for a text that is too short for its share.
    """
    options: dict[str, Any] = {"seed": seed, "vocabulary": vocabulary, "purpose": purpose}
    shares = split_shares(sources)
    if bos is not None and all(share.source == SELF for share in shares):
        raise CalibrationError("self: the model writes its text as it begins one itself; leave --bos out")
    if len(shares) == 1 and shares[0].source == SELF:
        return _own(starts, samples, held_out, seq_len or DEFAULT_SEQ_LEN, seed)
    if len(shares) == 1:
        known: dict[str, Any] = options | {"seq_len": seq_len, "samples": samples, "held_out": held_out}
        return load_windows(shares[0].source, tokenizer, text_field=text_field, bos=bos, **known)
    if text_field is not None and not any(has_columns(share.source) for share in shares):
        raise CalibrationError(f"no table is among the texts, so there is no column {text_field!r}; leave it out")
    length = seq_len or _stored_length(shares)
    counts = apportion(samples, shares)
    held_of_each = max(LEAST_HELD_OUT, held_out // len(shares)) if held_out else 0
    parts: list[Windows] = []
    for share, count in zip(shares, counts, strict=True):
        if share.source == SELF:
            parts.append(_own(starts, count, held_of_each, length or DEFAULT_SEQ_LEN, seed))
            continue
        column = text_field if has_columns(share.source) else None
        known = options | {"seq_len": length, "samples": count, "held_out": held_of_each}
        part = load_windows(
            share.source, tokenizer, text_field=column, bos=None if is_token_file(share.source) else bos, **known
        )
        if len(part.ids) < count:
            raise CalibrationError(
                f"{share.source}: {len(part.ids)} windows of {part.ids.shape[1]} tokens beside {len(part.held_out)} held "
                f"out, and its share is {count}; give more of it, a smaller weight, or fewer --calibration-samples"
            )
        parts.append(part)
    return mixed(shares, parts, seed)


def mixed(shares: Sequence[Share], parts: Sequence[Windows], seed: int) -> Windows:
    """The windows of `parts`, one for each share, as one: shuffled by the seed; held-out ones part after part."""
    unwritten = next((part.unwritten for part in parts if part.unwritten), None)
    order = torch.randperm(sum(len(part.ids) for part in parts), generator=torch.Generator().manual_seed(seed))
    device = "cpu" if unwritten is None else "meta"
    ids = torch.cat([part.ids.to(device) for part in parts])[order.to(device)]
    held = torch.cat([part.held_out.to(device) for part in parts])
    named = list(zip(names(shares), shares, parts, strict=True))
    sources = [{"source": name, "weight": share.weight} | part.protocol for name, share, part in named]
    notes = [f"{name}: {part.protocol['note']}" for name, _, part in named if "note" in part.protocol]
    protocol: dict[str, Any] = {"sources": sources, "order": "seeded", "seed": seed, "held_out_from": "each of them"}
    made = Windows.of(ids, held, protocol | ({"note": "; ".join(notes)} if notes else {}))
    owners = [name for name, _, part in named for _ in range(len(part.ids))]
    places: list[int] = order.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    ids_of = tuple(owners[place] for place in places)
    held_out_of = tuple((name, len(part.held_out)) for name, _, part in named)
    made = replace(made, held_out_of=held_out_of, ids_of=ids_of)
    if unwritten is None:
        return made
    texts = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()

    def complete(own: Windows) -> Windows:
        return mixed(shares, [own if part.unwritten else part for part in parts], seed)

    return replace(made, fingerprint=texts, unwritten=replace(unwritten, complete=complete))


def _own(starts: Starts | None, samples: int, held_out: int, length: int, seed: int) -> Windows:
    """Windows that the model has yet to write."""
    assert starts is not None
    protocol = own_protocol(starts, seed)
    unwritten = Unwritten(starts, samples + held_out, samples, length, seed, protocol, complete=lambda own: own)
    ids = torch.empty(samples + held_out, length, dtype=torch.int64, device="meta")
    others = {"held_out_from": "other windows that it wrote"}
    return replace(Windows.of(ids[:samples], ids[samples:], protocol | others), unwritten=unwritten)


def own_windows(unwritten: Unwritten, ids: Tensor) -> Windows:
    """Those that the model has written, (windows, length) int64, with all others of the run."""
    others = {"held_out_from": "other windows that it wrote"}
    own = Windows.of(ids[: unwritten.calibration], ids[unwritten.calibration :], unwritten.protocol | others)
    return unwritten.complete(own)


def names(shares: Sequence[Share]) -> list[str]:
    """What a report calls each text: a file by its name alone, where no other one has it."""
    short = [Path(source).name if is_file_name(source) else source for source, _ in shares]
    return [name if short.count(name) == 1 else share.source for name, share in zip(short, shares, strict=True)]


def _stored_length(shares: Sequence[Share]) -> int | None:
    """Tokens in a row of the token files among them; None where there is none."""
    lengths = {share.source: stored_length(share.source, None) for share in shares if is_token_file(share.source)}
    for source, length in lengths.items():
        first, wanted = next(iter(lengths.items()))
        if length != wanted:
            raise CalibrationError(
                f"{source}: rows of {length} tokens, and those of {first} have {wanted}; a mix takes rows of one length"
            )
    return next(iter(lengths.values()), None)


def held_out_parts(windows: Windows) -> list[tuple[str, Tensor]]:
    """The held-out windows text by text, (n, seq_len) each, under their names; "" where there is one text alone."""
    if not windows.held_out_of:
        return [("", windows.held_out)]
    counts = [count for _, count in windows.held_out_of]
    texts = [name for name, _ in windows.held_out_of]
    return list(zip(texts, windows.held_out.split(counts), strict=True))  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
