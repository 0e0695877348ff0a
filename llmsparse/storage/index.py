"""Which file of a checkpoint folder holds which tensor: one file, or what `model.safetensors.index.json` says."""

# pyright: reportUnknownVariableType=false
from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llmsparse.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_map_of(folder: Path, absent: Collection[str]) -> dict[str, str]:
    """Tensor -> shard from the index; empty for a single file. Precedence as in transformers: the single file first."""
    index = folder / INDEX
    try:
        if (folder / SINGLE).is_file() or SINGLE in absent:
            return {}
        if not index.is_file():
            raise CheckpointError(f"{folder}: {_no_weights(folder)}")
        weight_map: Any = json.loads(index.read_bytes())["weight_map"]
        bare = all(Path(name).name == name for name in weight_map.values())
        missing = sorted({name for name in weight_map.values() if name not in absent and not (folder / name).is_file()})
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a checkpoint index (no weight_map of names); download it again") from error
    if not bare or not weight_map:
        raise CheckpointError(f"{index}: weight_map is empty or names files outside of its folder")
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{index}: names shard {missing[0]}{more}, which is missing; download the checkpoint again"
        )
    return weight_map


def _no_weights(folder: Path) -> str:
    """What to say about a folder with neither a single safetensors file nor an index."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth")) and name != "training_args.bin"]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return f"has {others[0]} but neither {SINGLE} nor {INDEX}; save the whole model with save_pretrained"
    if pickled:
        return (
            f"has only pickled weights ({pickled[0]}), which are not read; load and save_pretrained them as safetensors"
        )
    return f"holds no weights: wanted {SINGLE} or {INDEX}"
