"""Whether a checkpoint holds all that its config asks for, told from names and sizes alone."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from llmsparse.encodings.reader import DecodedReader
from llmsparse.errors import CheckpointError
from llmsparse.models.naming import Naming
from llmsparse.models.origin import load_config
from llmsparse.storage.checkpoint import CheckpointReader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FEW_BLOCKS = 1000  # which are built in seconds, whatever is on disk


def config_of(reader: CheckpointReader, trust_remote_code: bool) -> Any:
    """The config of the model that `reader` reads, whose weights come as they stand for, whatever they are stored as."""
    encoded = isinstance(reader, DecodedReader)
    config: Any = load_config(reader.folder, trust_remote_code, packed=reader.packed, encoded=encoded)
    if reader.packed:
        vars(config).pop("quantization_config", None)
    return config


def check_depth(config: PretrainedConfig, reader: CheckpointReader) -> None:
    """CheckpointError for a config of more blocks than there are tensors: to build them all might take hours."""
    depth: int | None = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(depth, int) and depth > max(len(reader.keys()), FEW_BLOCKS):
        raise CheckpointError(
            f"{reader.folder}: config.json asks for {depth:,} blocks (num_hidden_layers), and there are "
            f"{len(reader.keys())} tensors; the two do not belong together"
        )


def refuse_integers(reader: CheckpointReader) -> None:
    """CheckpointError for a weight stored in integers, in a checkpoint that says nothing of their scale."""
    for key in reader.keys():
        dtype = reader.spec(key).dtype
        if key.endswith(".weight") and not dtype.is_floating_point:
            raise CheckpointError(
                f"{reader.folder}: {key} is stored in {str(dtype).removeprefix('torch.')}, and config.json does not say what "
                "that stands for (quantization_config); start from the checkpoint in 16 or 32 bits"
            )


def check_complete(model: PreTrainedModel, naming: Naming, reader: CheckpointReader) -> dict[str, str]:
    """Tied parameters that are not on disk → the one that is. CheckpointError if any other is missing, or of another
    size than config.json asks for."""
    on_disk = {name for group in naming.groups.values() for name in group.targets}
    tied: dict[str, str] = {}
    for target, origin in model.all_tied_weights_keys.items():
        if target not in on_disk:
            tied[target] = origin
        elif origin not in on_disk:
            tied[origin] = target
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in parameters if tied.get(name, name) not in on_disk]
    if missing:
        raise CheckpointError(
            f"{reader.folder}: {len(missing)} of the tensors that config.json asks for are not on disk, "
            f"{missing[0]!r} among them; download the checkpoint again"
        )
    for group in naming.groups.values():
        held = sum(math.prod(reader.spec(key).shape) for key in group.keys)
        wanted = sum(model.get_parameter_or_buffer(name).numel() for name in group.targets)
        if held != wanted:
            others = f" and {len(group.keys) - 1} like it hold" if len(group.keys) > 1 else " holds"
            raise CheckpointError(
                f"{reader.folder}: tensor {group.keys[0]!r}{others} {held} elements, config.json asks for "
                f"{wanted} in {group.target!r}; the two do not belong together, or something is missing"
            )
    return tied
