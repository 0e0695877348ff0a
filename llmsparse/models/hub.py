"""A model on the Hugging Face hub: fetched whole, or for a plan all but its weights, of which headers will do.

Whatever is in the cache is not fetched again, and `HF_HUB_OFFLINE` is respected. Every failure is one line.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llmsparse.errors import CheckpointError, MachineError, one_line
from llmsparse.storage.checkpoint import INDEX, SINGLE
from llmsparse.storage.pickled import is_pickled
from llmsparse.storage.shard import Header, header_of

Answer = TypeVar("Answer")

WEIGHTS = ["*.safetensors"]
DESCRIPTIONS = ["*.json", "llmsparse_*.st", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]
# other copies of the same weights: Mistral's own layout, half-precision variants, exports in folders of their own
LEFT = ["consolidated*", "*.fp16*", "*/*.safetensors", "*/*.json", "*/*.txt"]


def fetch(model: str, revision: str | None = None) -> Path:
    """The folder of a hub model in the cache, with its safetensors, or pickled weights where it has no others, and all that
    belongs to them.

    Raises CheckpointError where there is no such model, no leave to read it or no weights, and MachineError without
    a network.
    """
    folder = _snapshot(model, revision, [*WEIGHTS, *DESCRIPTIONS])
    return folder if any(folder.glob("*.safetensors")) else _fetch_pickled(model, folder)


def look_at(model: str, revision: str | None = None) -> tuple[Path, dict[str, Header]]:
    """Its folder as `fetch` gives it, but for the shards that are not in the cache: the headers of these, by name.

    Errors as of `fetch`.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    folder = _snapshot(model, revision, DESCRIPTIONS)
    if not _missing(folder):
        return folder, {}
    try:
        found = _ask(lambda: get_safetensors_metadata(model, revision=folder.name).files_metadata, model, revision)
    except NotASafetensorsRepoError:
        return _fetch_pickled(model, folder), {}  # whose shapes stand nowhere but in the weights
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{model}: corrupt safetensors on the hub: {one_line(error)}") from error
    headers: dict[str, Header] = {}
    for name in sorted(found):
        if not (folder / name).is_file():
            tensors = {
                key: {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": list(one.data_offsets)}
                for key, one in found[name].tensors.items()
            }
            headers[name] = header_of(folder / name, json.dumps(tensors).encode())
    return folder, headers


def commit_of(folder: Path) -> str | None:
    """The commit that a folder in the hub's cache is a snapshot of; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _missing(folder: Path) -> bool:
    """Whether a snapshot lacks weights; a damaged index is for the reader to complain about."""
    if (folder / SINGLE).is_file():
        return False
    try:
        names: list[str] = json.loads((folder / INDEX).read_bytes())["weight_map"].values()
        return not all((folder / name).is_file() for name in names)
    except FileNotFoundError:
        return True
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _snapshot(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return _ask(
        lambda: Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=LEFT)),
        model,
        revision,
    )


def _ask(request: Callable[[], Answer], model: str, revision: str | None) -> Answer:
    """The answer to a request to the hub, or one line that says why there is none."""
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    what = f"{model} at revision {revision}" if revision else model
    try:
        return request()
    except errors.HFValidationError as error:
        raise CheckpointError(f"{model}: neither a folder nor a hub id (owner/name)") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model}: gated; accept its licence at {constants.ENDPOINT}/{model}, then run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model}: no such folder, and no such model at {constants.ENDPOINT}; "
            "check the spelling, or run `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{model}: has no revision {revision!r}; see {constants.ENDPOINT}/{model}/tree"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(what, error) from error
    except (OSError, HTTPError, RuntimeError) as error:  # RuntimeError comes from the chunk downloader, hf_xet
        raise MachineError(f"{what}: download failed: {one_line(error)}; run again to go on with it") from error


def _unreachable(what: str, error: OSError) -> MachineError:
    """No network, or none wanted, and no complete copy in the cache."""
    from huggingface_hub import constants, errors

    partly = isinstance(error, errors.IncompleteSnapshotError | errors.OfflineModeIsEnabled)
    found = f"no such folder, and {'only part of it' if partly else 'nothing'} in the cache"
    if constants.is_offline_mode():
        return MachineError(f"{what}: {found} while offline (HF_HUB_OFFLINE=1); name a local folder, or go online once")
    cause = one_line(error.__cause__ or error)
    return MachineError(f"{what}: {found}, and {constants.ENDPOINT} is out of reach ({cause}); name a local folder")


def _fetch_pickled(model: str, folder: Path) -> Path:
    """The snapshot of a repository that holds no safetensors, with its pickled weights. CheckpointError where it holds none."""
    folder = _snapshot(model, folder.name, [*DESCRIPTIONS, "pytorch_model*.bin"])
    if not is_pickled(folder):
        raise CheckpointError(f"{model}: its hub repository holds neither safetensors nor pytorch_model.bin")
    return folder
