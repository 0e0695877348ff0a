"""Where text comes from: `builtin`, `c4`, `wikitext2`, a dataset on the hub, or a file; `wikitext2:FILE` is a local copy.

A source is opened as documents and a protocol that names it to the letter (dataset, revision, split). Hub datasets are
pinned to a commit and streamed, so that 128 windows of C4 do not download a shard; files go through the same library
and leave nothing in its cache. Every failure is one line that says what else to give.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false

from __future__ import annotations

import platform
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from llmsparse.errors import CalibrationError, MachineError
from llmsparse.storage.home_folder import expand_home
from llmsparse.text import builtin
from llmsparse.text.columns import documents, joined
from llmsparse.text.kinds import AUTO, BUILDERS, KINDS, KNOWN, SELF, TEXT_SUFFIX, WIKITEXT_COPY, file_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase | None

Purpose = Literal["calibration", "training", "evaluation"]

PART = 2**20  # characters of a text file read at once

C4 = ("allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2")
C4_FILES = {
    "calibration": ("train", "en/c4-train.00000-of-01024.json.gz"),
    "training": ("train", "en/c4-train.00000-of-01024.json.gz"),
    "evaluation": ("validation", "en/c4-validation.00000-of-00008.json.gz"),
}
WIKITEXT = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")
WIKITEXT_FILES = {
    "calibration": ("train", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
    "training": ("train", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
    "evaluation": ("test", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
}
SPLITS = {
    "calibration": ("train",),
    "training": ("train",),
    "evaluation": ("test", "validation", "train"),
}  # first choice first
INSTEAD = "use --{option} builtin (Python's standard library text) or --{option} FILE"
OPTION = {"calibration": "calibration", "training": "text", "evaluation": "text"}


@dataclass(frozen=True)
class Texts:
    """`documents` to be read once, each in parts as they are read; `endless` if there may be far more than anyone wants."""

    documents: Iterator[Iterable[str]]
    endless: bool
    protocol: dict[str, Any]


def open_texts(source: str, purpose: Purpose, text_field: str | None = None, tokenizer: Tokenizer = None) -> Texts:
    """Open `source` for calibrating, for training or for evaluating; chats are spelled by the template of `tokenizer`.

    Raises CalibrationError for what cannot be read and MachineError when it takes a network that is not there.
    """
    if text_field is not None and source in KNOWN:
        raise CalibrationError(
            f"{source}: its text is known, there is no column {text_field!r} to choose; leave it out"
        )
    if source in (SELF, AUTO):
        raise CalibrationError(
            f"{source} is for calibration alone, for some of it a model writes itself; {_instead(purpose)}"
        )
    if source == "builtin":
        return _builtin(purpose)
    if source == "c4":
        return _c4(purpose)
    if source == "wikitext2":
        return _wikitext(purpose)
    if source.startswith(WIKITEXT_COPY):
        return _wikitext_copy(expand_home(source.removeprefix(WIKITEXT_COPY), CalibrationError), text_field)
    path = expand_home(source, CalibrationError)
    if path.exists() or file_kind(path):
        return _file(path, text_field, tokenizer)
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.-]+))?", source)
    if hub is None:
        raise CalibrationError(
            f"no text {source!r}: neither a file, nor self, builtin, c4 or wikitext2, nor a dataset such as org/name:split"
        )
    return _hub(hub[1], hub[2], hub[3], purpose, text_field, tokenizer)


def _builtin(purpose: Purpose) -> Texts:
    protocol = {"dataset": "builtin", "text": builtin.describe(purpose), "python": platform.python_version()}
    return Texts(((text,) for text in builtin.texts(purpose)), False, protocol)


def _file(path: Path, text_field: str | None, tokenizer: Tokenizer) -> Texts:
    kind = _checked_kind(path)
    if kind == TEXT_SUFFIX:
        if text_field not in (None, "text"):
            raise CalibrationError(f"{path}: no column {text_field!r}; a {TEXT_SUFFIX} file is one text")
        return Texts(iter([_parts(path)]), False, {"file": path.name})
    found = documents(_rows(str(path), BUILDERS[kind], str(path)), text_field, str(path), tokenizer)
    return Texts(found.texts, False, {"file": path.name} | found.protocol)


def _wikitext_copy(path: Path, text_field: str | None) -> Texts:
    """A local copy of WikiText, as table or as plain text, whose lines are the rows: one text, as `_wikitext`'s."""
    kind = _checked_kind(path)
    if kind == TEXT_SUFFIX:
        lines = "".join(_parts(path)).removesuffix("\n").split("\n")
        rows: Iterator[Any] = ({"text": f"{line}\n" if line.strip() else ""} for line in lines)
    else:
        rows = _rows(str(path), BUILDERS[kind], str(path))
    found = joined(rows, text_field, str(path))
    return Texts(found.texts, False, {"file": path.name} | found.protocol)


def _checked_kind(path: Path) -> str:
    """The kind of a file that can be read. CalibrationError for any other."""
    if path.is_dir():
        raise CalibrationError(f"{path}: is a folder, wanted one {KINDS} file")
    kind = file_kind(path)
    if kind is None:
        raise CalibrationError(f"{path}: unknown kind of file, wanted {KINDS}")
    if not path.exists():
        raise CalibrationError(f"{path}: no such file")
    try:
        if path.stat().st_size == 0:
            raise CalibrationError(f"{path}: is empty, wanted text")
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from None
    return kind


def _parts(path: Path) -> Iterator[str]:
    """A text file, read as it is asked for: it may be larger than memory."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # which drops a byte order mark
            for part in iter(lambda: file.read(PART), ""):
                if "\0" in part:
                    raise CalibrationError(f"{path}: is binary, wanted UTF-8 text")
                yield part
    except UnicodeDecodeError:
        raise CalibrationError(f"{path}: is binary, or not UTF-8; wanted UTF-8 text") from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from None


def _rows(path: str, builder: str, where: str) -> Iterator[dict[str, Any]]:
    """The rows of a local file, read as they are asked for."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with TemporaryDirectory() as cache:  # for its lock files: nothing is copied when streaming
            rows: Any = load_dataset(builder, data_files=path, split="train", streaming=True, cache_dir=cache)
        yield from rows
    except (OSError, EOFError, zlib.error, ValueError, TypeError, RecursionError, DatasetsError) as error:
        if path.lower().endswith(".zst") and find_spec("zstandard") is None:
            raise CalibrationError(f"{where}: unpack it first, or install zstandard, which reads .zst") from None
        raise CalibrationError(f"{where}: cannot be read as {builder}: {_first_line(error)}") from None


def _c4(purpose: Purpose) -> Texts:
    (name, revision), (split, file) = C4, C4_FILES[purpose]
    cached = _cached(name, revision, file)
    if cached is not None:
        rows = _rows(cached, "json", name)
    else:
        _reach(name, revision, purpose, "c4")
        rows = _streamed(name, purpose, "c4", data_files={split: file}, split=split, revision=revision)
    protocol = {"dataset": name, "file": file, "revision": revision, "split": split}
    found = documents(rows, "text", "c4", None)
    return Texts(found.texts, True, protocol | found.protocol)


def reach_c4() -> None:
    """MachineError where C4 is neither in the cache nor to be had."""
    (name, revision), (_, file) = C4, C4_FILES["calibration"]
    if _cached(name, revision, file) is None:
        _reach(name, revision, "calibration", "c4")


def _wikitext(purpose: Purpose) -> Texts:
    """All rows of the split joined by a blank line, as the papers have it: one text."""
    from huggingface_hub import hf_hub_download

    (name, revision), (split, file) = WIKITEXT, WIKITEXT_FILES[purpose]
    path = _cached(name, revision, file)
    if path is None:
        _reach(name, revision, purpose, "wikitext2")
        try:
            path = hf_hub_download(name, file, repo_type="dataset", revision=revision)
        except _network_errors() as error:
            raise _unreachable("wikitext2", purpose, error) from None
    found = joined(_rows(path, "parquet", name), None, "wikitext2")
    protocol = {"dataset": name, "file": file, "revision": revision, "split": split}
    return Texts(found.texts, False, protocol | found.protocol)


def _hub(
    name: str, config: str | None, split: str | None, purpose: Purpose, text_field: str | None, tokenizer: Tokenizer
) -> Texts:
    revision = _reach(name, None, purpose, name)
    from datasets import get_dataset_split_names
    from datasets.exceptions import DatasetsError

    try:
        if split is None:
            known: list[str] = get_dataset_split_names(name, config, revision=revision)
            split = next((wish for wish in SPLITS[purpose] if wish in known), known[0])
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise CalibrationError(f"dataset {name} cannot be read: {_first_line(error)}") from None
    rows = _streamed(name, purpose, name, config=config, split=split, revision=revision)
    protocol = {"dataset": name, "revision": revision, "split": split} | ({"config": config} if config else {})
    found = documents(rows, text_field, name, tokenizer)
    return Texts(found.texts, True, protocol | found.protocol)


def _streamed(name: str, purpose: Purpose, label: str, *, config: str | None = None, **options: Any) -> Iterator[Any]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        yield from load_dataset(name, config, streaming=True, **options)
    except (ValueError, RuntimeError, DatasetsError) as error:
        raise CalibrationError(f"dataset {name} cannot be read: {_first_line(error)}") from None
    except _network_errors() as error:
        raise _unreachable(label, purpose, error) from None


def _reach(name: str, revision: str | None, purpose: Purpose, label: str) -> str:
    """The commit of a dataset on the hub, after one quick request: `datasets` would retry for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except GatedRepoError:
        raise CalibrationError(
            f"dataset {name} is gated: accept its terms on the hub and run `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise CalibrationError(f"no dataset {name!r} on the hub; {_instead(purpose)}") from None
    except _network_errors() as error:
        raise _unreachable(label, purpose, error) from None


def _cached(name: str, revision: str, file: str) -> str | None:
    """A hub file that is on this machine already."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, file, revision=revision, repo_type="dataset")
    return path if isinstance(path, str) else None


def _network_errors() -> tuple[type[BaseException], ...]:
    """What a request to the hub may raise."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return (OSError, HTTPError)


def _unreachable(label: str, purpose: Purpose, error: BaseException) -> MachineError:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return MachineError(f"{label} cannot be read ({_first_line(error)}); try again, or {_instead(purpose)}")
    reason = "" if isinstance(error, OfflineModeIsEnabled) else f" ({_first_line(error)})"
    return MachineError(f"{label} cannot be read offline{reason}: {_instead(purpose)}")


def _instead(purpose: Purpose) -> str:
    return INSTEAD.format(option=OPTION[purpose])


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ if error.__cause__ is not None and "generat" in str(error) else error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)[:300]
