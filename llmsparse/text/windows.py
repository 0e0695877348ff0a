"""Text → windows of token ids, the same for the same seed, with a protocol that says how they came about.

Texts are tokenized with the special tokens the tokenizer gives each of them, joined, and cut into full windows without
padding; a remainder is dropped. A stored `input_ids` tensor is taken as it is: a run repeated to the token.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmsparse.errors import CalibrationError
from llmsparse.storage.home_folder import expand_home
from llmsparse.text.bos import Bos, begins, special_tokens, special_with
from llmsparse.text.kinds import TOKEN_FILE_SUFFIX, is_token_file
from llmsparse.text.own_text import Unwritten
from llmsparse.text.sources import Purpose, open_texts
from llmsparse.text.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SEQ_LEN = 2048
MAX_TOKENS = 2**24  # read of a file of many texts: 8192 windows of 2048, 128 MiB
ENDLESS_WINDOWS = 256  # evaluated of a dataset that is streamed, as is usual for C4
HELD_OUT_SHARE = 8  # a text too short for all that was asked gives up to one window in 8 to be held out

__all__ = ["TOKEN_FILE_SUFFIX", "Windows", "is_token_file", "load_evaluation", "load_windows"]


@dataclass(frozen=True)
class Windows:
    """`ids` (n, seq_len) int64; `held_out` (m, seq_len) int64 from the same source, none of them in `ids`.

    Both are on meta as long as some are `unwritten`.
    """

    ids: Tensor
    held_out: Tensor
    protocol: dict[str, Any]  # JSON-able; "note" where something is not as asked
    fingerprint: str  # sha256 of both tensors
    unwritten: Unwritten | None = None
    held_out_of: tuple[
        tuple[str, int], ...
    ] = ()  # of a mix: each text and how many windows are held out of it, in order
    ids_of: tuple[str, ...] = ()  # of a mix: the text of each window of `ids`

    @classmethod
    def of(cls, ids: Tensor, held_out: Tensor, protocol: dict[str, Any]) -> Windows:
        digest = hashlib.sha256()
        for tensor in (ids, held_out):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(str(protocol).encode() if tensor.is_meta else tensor.contiguous().numpy().tobytes())
        sizes = {"seq_len": ids.shape[1], "windows": len(ids), "tokens": ids.numel()}
        origin = {"held_out_from": protocol.pop("held_out_from", "the rows that follow")}
        held = {"held_out_windows": len(held_out)} | origin if len(held_out) else {}
        note = {"note": protocol.pop("note")} if "note" in protocol else {}
        return cls(ids, held_out, protocol | sizes | held | note, digest.hexdigest())


def load_windows(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seq_len: int | None,
    samples: int,
    seed: int,
    held_out: int = 0,
    text_field: str | None = None,
    vocabulary: int | None = None,
    purpose: Purpose = "calibration",
    bos: Bos | None = None,
) -> Windows:
    """`samples` windows to calibrate or train on and `held_out` others, or as many as there are (`protocol["note"]` says so).

    `seq_len` None is a token file's own width, and 2048 for text. A file gives a seeded choice of all its windows, a
    streamed dataset its first ones; held-out windows are of other texts where that costs no window.
    A token file gives its first rows, then the held-out ones; it needs no tokenizer. Ids must stay below `vocabulary`.
    `bos` says where a BOS stands, the tokenizer if it is not given.
    Raises CalibrationError, and MachineError without a network, in one line.
    """
    if is_token_file(source):
        _refuse_bos(source, bos)
        rows = _stored(expand_home(source, CalibrationError), seq_len, vocabulary)
        ids, held = rows[:samples], rows[samples : samples + held_out]
        return Windows.of(ids, held, _stored_protocol(source) | _note(len(ids), samples, len(held), held_out))
    assert tokenizer is not None
    seq_len = seq_len or DEFAULT_SEQ_LEN
    texts = open_texts(source, purpose, text_field, tokenizer)
    protocol = texts.protocol | {"seed": seed} | _tokenizer_protocol(tokenizer, bos)
    if texts.endless:
        documents, _ = _tokens(texts.documents, tokenizer, vocabulary, samples * seq_len, bos)
        ids = _cut(documents, seq_len)[:samples]
        others, _ = _tokens(texts.documents, tokenizer, vocabulary, held_out * seq_len, bos, first=False)
        held = _cut(others, seq_len)[:held_out]
        protocol |= {"choice": "first texts in order", "held_out_from": "the texts that follow"}
    else:
        documents, cut = _tokens(texts.documents, tokenizer, vocabulary, MAX_TOKENS, bos)
        ids, held, origin = _draw(documents, seq_len, samples, held_out, torch.Generator().manual_seed(seed))
        protocol |= {"choice": "seeded, of all windows", "held_out_from": origin}
        if cut:
            protocol["read"] = f"the first {sum(map(len, documents)):,} tokens"
        elif next(texts.documents, None) is not None:
            protocol["read"] = f"the first {len(documents):,} texts"
    _refuse_short(ids, documents, seq_len, source)
    return Windows.of(ids, held, protocol | _note(len(ids), samples, len(held), held_out))


def load_evaluation(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seq_len: int | None,
    limit: int | None = None,
    text_field: str | None = None,
    vocabulary: int | None = None,
    bos: Bos | None = None,
) -> Windows:
    """All windows in order without overlap, the first `limit` of them if given; of a streamed dataset the first 256.

    Arguments and errors otherwise as of `load_windows`; nothing is held out.
    """
    if is_token_file(source):
        _refuse_bos(source, bos)
        ids = _stored(expand_home(source, CalibrationError), seq_len, vocabulary)[:limit]
        return Windows.of(ids, ids[:0], _stored_protocol(source))
    assert tokenizer is not None
    seq_len = seq_len or DEFAULT_SEQ_LEN
    texts = open_texts(source, "evaluation", text_field, tokenizer)
    limit = ENDLESS_WINDOWS if limit is None and texts.endless else limit
    documents, _ = _tokens(texts.documents, tokenizer, vocabulary, None if limit is None else limit * seq_len, bos)
    ids = _cut(documents, seq_len)[:limit]
    _refuse_short(ids, documents, seq_len, source)
    return Windows.of(ids, ids[:0], texts.protocol | _tokenizer_protocol(tokenizer, bos))


def _tokens(
    texts: Iterator[Iterable[str]],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int | None,
    wanted: int | None,
    bos: Bos | None,
    *,
    first: bool = True,
) -> tuple[list[Tensor], bool]:
    """The ids of each text, until they are `wanted` in total, and whether that cut the last text short.

    The iterator is left behind the last text used.
    """
    documents: list[Tensor] = []
    total = 0
    while wanted is None or total < wanted:
        text = next(texts, None)
        if text is None:
            break
        pieces: list[Tensor] = []
        for ids in tokenize(text, tokenizer, begins(bos, first and not documents)):
            if wanted is not None and total >= wanted:
                return [*documents, torch.cat(pieces)], True
            pieces.append(torch.tensor(ids, dtype=torch.int64))
            _refuse_beyond(pieces[-1], vocabulary, f"tokenizer {_name(tokenizer)}")
            total += len(ids)
        documents.append(torch.cat(pieces))
    return documents, False


def _cut(documents: Sequence[Tensor], seq_len: int) -> Tensor:
    """All full windows of the documents joined, (n, seq_len)."""
    joined = torch.cat(list(documents)) if documents else torch.empty(0, dtype=torch.int64)
    return joined[: len(joined) // seq_len * seq_len].view(-1, seq_len)


def _draw(
    documents: Sequence[Tensor], seq_len: int, samples: int, held_out: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, str]:
    """Calibration windows, held-out windows, and what sets these apart: other texts where that costs no window."""
    total = sum(map(len, documents)) // seq_len
    if total < samples + held_out:
        held_out = min(held_out, max(total - samples, total // HELD_OUT_SHARE))
    samples = min(samples, total - held_out)
    others, taken = set[int](), 0  # documents to hold out, and their tokens
    for index in torch.randperm(len(documents), generator=generator).tolist():
        if taken >= held_out * seq_len:
            break
        others.add(index)
        taken += len(documents[index])
    ids = _shuffled(_cut([ids for index, ids in enumerate(documents) if index not in others], seq_len), generator)
    held = _shuffled(_cut([documents[index] for index in sorted(others)], seq_len), generator)
    if len(ids) >= samples and len(held) >= held_out:
        return ids[:samples], held[:held_out], "other texts"
    windows = _shuffled(_cut(documents, seq_len), generator)
    return windows[:samples], windows[samples : samples + held_out], "other windows of the same texts"


def _shuffled(windows: Tensor, generator: torch.Generator) -> Tensor:
    return windows[torch.randperm(len(windows), generator=generator)]


def _stored(path: Path, seq_len: int | None, vocabulary: int | None) -> Tensor:
    """`input_ids` (samples, tokens) of a safetensors file as int64."""
    try:
        with safe_open(path, "pt") as file:
            if "input_ids" not in file.keys():
                raise CalibrationError(f"{path}: no tensor input_ids; it holds other things")
            ids = file.get_tensor("input_ids")
    except FileNotFoundError:
        raise CalibrationError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path}: is not a safetensors file ({error})") from None
    whole = not (ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool)
    if ids.dim() != 2 or not whole or ids.numel() == 0:
        raise CalibrationError(
            f"{path}: input_ids is {str(ids.dtype).removeprefix('torch.')} {tuple(ids.shape)}, "
            "wanted integers (samples, tokens)"
        )
    if ids.shape[1] < 2:
        raise CalibrationError(f"{path}: rows of 1 token, wanted 2 or more: the first has nothing before it")
    if seq_len is not None and ids.shape[1] != seq_len:
        raise CalibrationError(
            f"{path}: rows of {ids.shape[1]} tokens, but --seq-len is {seq_len}; "
            f"leave it out, or use --seq-len {ids.shape[1]}"
        )
    ids = ids.to(torch.int64)  # first: torch has no extremes of unsigned integers
    _refuse_beyond(ids, vocabulary, str(path))
    return ids


def stored_length(source: str, seq_len: int | None) -> int:
    """Tokens in a row of a token file. CalibrationError as of `load_windows`."""
    return _stored(expand_home(source, CalibrationError), seq_len, None).shape[1]


def _refuse_beyond(ids: Tensor, vocabulary: int | None, where: str) -> None:
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        wrong = low if low < 0 else high
        raise CalibrationError(
            f"{where}: token id {wrong} is outside the model's vocabulary of {vocabulary}; "
            "the tokens are another model's"
        )


def _refuse_short(ids: Tensor, documents: Sequence[Tensor], seq_len: int, source: str) -> None:
    if len(ids):
        return
    count = sum(map(len, documents))
    if count == 0:
        raise CalibrationError(f"{source}: is empty, wanted text")
    raise CalibrationError(
        f"{source}: {count} tokens, shorter than one window of {seq_len}; give more text, or --seq-len {count} or less"
    )


def _note(windows: int, samples: int, held: int, held_out: int) -> dict[str, str]:
    if windows < samples:
        kept = f" and {held} held out" if held_out else ""
        return {"note": f"the text has fewer windows than asked: {windows} of {samples} used{kept}"}
    if held < held_out:
        return {"note": f"the text has fewer windows than asked: {held} of {held_out} held out"}
    return {}


def _stored_protocol(source: str) -> dict[str, Any]:
    return {"file": Path(source).name, "choice": "stored tokens in order"}


def _refuse_bos(source: str, bos: Bos | None) -> None:
    if bos is not None:
        raise CalibrationError(f"{source}: stored tokens are taken as they are; leave --bos out")


def _tokenizer_protocol(tokenizer: PreTrainedTokenizerBase, bos: Bos | None) -> dict[str, Any]:
    before, after = (special_tokens(tokenizer) or ([], [])) if bos is None else special_with(tokenizer, bos != "none")
    names = " ".join(map(str, tokenizer.convert_ids_to_tokens([*before, *after])))
    where = ", BOS before the first text alone" if bos == "once" else ""
    return {"tokenizer": _name(tokenizer), "special_tokens": f"{names}, once per text{where}" if names else "none"}


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    """The folder's name, or org/name of a hub snapshot."""
    parts = Path(str(tokenizer.name_or_path)).resolve().parts
    if "snapshots" in parts:
        return parts[parts.index("snapshots") - 1].removeprefix("models--").replace("--", "/")
    return parts[-1]
