"""The language model of a model that wraps one, as a model of its own: its config, and its tensors under their own names.

The wrapping model says where its language model is (`get_decoder`), and transformers which class is for that alone; what
the tensors are called there follows from the place of that class's decoder.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import copy
from typing import Any

import torch

from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.models.empty_model import build_empty, quiet
from llmsparse.models.renamed import RenamedReader
from llmsparse.models.streamed import StreamedModel
from llmsparse.storage.checkpoint import CheckpointReader

READERS = (  # files beside the weights that only say how images and sound are read
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def language_model(wrapping: StreamedModel, reader: CheckpointReader) -> tuple[StreamedModel, RenamedReader]:
    """The language model in `wrapping`, which `reader` reads, and the reader of its tensors.

    RecipeError for a model that wraps none, or one that transformers has no class for, CheckpointError where its tensors
    do not fit that class.
    """
    config = _config(wrapping)
    with quiet():
        empty = build_empty(config, torch.device("meta"), wrapping.dtype, False)
    names = _renamed(wrapping, _path(empty, empty.get_decoder()))
    if wrapping.tied_head is None:
        head = _path(empty, empty.get_output_embeddings())
        names[f"{head}.weight"] = wrapping.head_weights()[0].key
    renamed = RenamedReader(reader, names)
    return StreamedModel(renamed, device=wrapping.device, dtype=wrapping.dtype, config=config), renamed


def _config(wrapping: StreamedModel) -> Any:
    """The config of the language model alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    whole, text = wrapping.config, wrapping.config.get_text_config()
    if text is whole:
        raise RecipeError(f"--text-only: {wrapping.folder} is a language model already; leave it out")
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if causal is None:
        raise RecipeError(
            f"--text-only: transformers has no class for the language model of {wrapping.folder} alone "
            f"({type(text).__name__}); leave it out"
        )
    config = copy.deepcopy(text)
    config.architectures = [causal.__name__]
    config.tie_word_embeddings = wrapping.tied_head is not None
    config.dtype = text.dtype or whole.dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is read is decoded
    config._name_or_path = str(wrapping.folder)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, token, None) is None and getattr(whole, token, None) is not None:
            setattr(config, token, getattr(whole, token))
    return config


def _renamed(wrapping: StreamedModel, decoder: str) -> dict[str, str]:
    """Every tensor of the wrapped decoder, as it is called where the decoder stands at `decoder`, → its name on disk."""
    path, groups = wrapping.decoder_path + ".", wrapping.naming.groups
    inside = [group for name, group in groups.items() if name.startswith(path)]
    alike = {  # on disk, what stands in front of names that are those of the module
        group.keys[0].removesuffix(name.removeprefix(path))
        for name, group in groups.items()
        if name.startswith(path) and group.keys[0].endswith(name.removeprefix(path))
    }
    if len(alike) != 1:
        raise CheckpointError(
            f"{wrapping.folder}: the tensors of its language model stand under {len(alike)} names on disk ({', '.join(sorted(alike))}), "
            "so it cannot be written on its own; leave --text-only out"
        )
    [prefix] = alike
    return {f"{decoder}.{key.removeprefix(prefix)}": key for group in inside for key in group.keys}


def _path(model: Any, module: Any) -> str:
    return next(name for name, one in model.named_modules() if one is module)
