"""From what the user calls a model to one that runs, whether its folder is dense, pruned or packed."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmsparse.backends.choice import AUTO, check_names
from llmsparse.errors import CheckpointError, RecipeError, checkpoint_at_fault, did_you_mean
from llmsparse.inference.cut_layers import cut_dense
from llmsparse.inference.experts_interface import fuse
from llmsparse.inference.quantizer import SparseConfig
from llmsparse.models.complete import check_depth, refuse_integers
from llmsparse.models.empty_model import quiet
from llmsparse.models.model_class import auto_class
from llmsparse.models.origin import is_packed, load_config, read_config, read_json
from llmsparse.packing.folder import PackedCheckpoint
from llmsparse.runs.device import DTYPES
from llmsparse.storage.pickled import open_stored

GENERATION = "generation_config.json"


def load_model(
    folder: Path,
    *,
    backend: str = AUTO,
    optimize: str = "memory",
    device: torch.device,
    dtype: str = "auto",
    experts: str = AUTO,
    expert_memory: str | int | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The causal LM in `folder`, by transformers, on `device`; `dtype` `auto` is that of the checkpoint.

    A packed folder runs on `backend`. Any other runs as it is where `backend` is `auto`, and is packed while it loads
    where one is named. Dense experts of a mixture run by `experts`, as in `fuse`; packed ones stay on
    disk but for as many as fit into `expert_memory`, if that is given. Raises CheckpointError for a folder
    that cannot be loaded whole, RecipeError for an unknown backend, MachineError for one that cannot run here.
    """
    check_names(backend, optimize)
    if dtype != "auto" and dtype not in DTYPES:
        raise RecipeError(f"dtype {dtype!r} is not known{did_you_mean(dtype, ['auto', *DTYPES])}")
    packed = is_packed(read_config(folder))
    # refuse, in a line, what is truncated or lacks a shard, packed weights that nobody can read, and what is no model
    reader = PackedCheckpoint(folder).reader if packed else open_stored(folder)
    config = load_config(folder, trust_remote_code, packed=packed)
    check_depth(config, reader)
    if (folder / GENERATION).is_file():
        read_json(folder / GENERATION)  # transformers passes over one that it cannot read
    if not packed:
        refuse_integers(reader)
    if expert_memory is not None and (not packed or device.type != "cpu"):
        wrong = f"the device is {device}" if packed else f"{folder} is not packed"
        raise RecipeError(
            f"--expert-memory is for packed folders on a CPU, {wrong}; pack it, or leave --expert-memory out"
        )
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are refused below, by name
    if packed or backend != AUTO:
        options["quantization_config"] = SparseConfig(backend=backend, optimize=optimize, expert_memory=expert_memory)
    if device.type != "cpu":
        options["device_map"] = {"": device}
    if str(device).startswith("cuda:"):
        torch.cuda.set_device(device)  # Triton launches its kernels on the current one
    with quiet(), checkpoint_at_fault(folder / "config.json", "build this model"):
        loaded: Any = auto_class(config, trust_remote_code).from_pretrained(folder, **options)
    model, info = loaded
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{folder}: tensor {name!r} has shape {list(stored)}, config.json asks for {list(wanted)}; the two do not belong together"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of the tensors that config.json asks for are not on disk, {missing[0]!r} among "
            "them; download or pack the checkpoint again"
        )
    return fuse(model if "quantization_config" in options else cut_dense(model, folder), experts)
