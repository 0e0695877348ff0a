"""A model whose output head is its input embedding, as one that has a head of its own.

It computes the same. On disk the embedding stands twice, the second time as the head, which can then be written in other
bits: the embedding is looked up in, a row for a token, but all of the head is read for every token.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from copy import deepcopy

from llmsparse.encodings.reader import without_encoding
from llmsparse.errors import RecipeError
from llmsparse.models.new_config import NewConfig, text_part
from llmsparse.models.origin import read_config
from llmsparse.models.renamed import RenamedReader
from llmsparse.models.streamed import StreamedModel
from llmsparse.storage.checkpoint import CheckpointReader

TIES = "tie_word_embeddings"


def untied(
    tied: StreamedModel, reader: CheckpointReader, trust_remote_code: bool
) -> tuple[StreamedModel, RenamedReader, NewConfig]:
    """The model in `reader` with a head of its own, the reader of its tensors, and the config.json that it needs.

    RecipeError for a class that ties its head whatever its config says.
    """
    raw = without_encoding(read_config(tied.folder))
    raw[TIES] = text_part(tied.config, raw)[TIES] = False
    config = type(tied.config).from_dict(deepcopy(raw))  # which takes things out of what it is given
    config.name_or_path = tied.config.name_or_path
    renamed = RenamedReader(reader, _twice(tied, reader))
    model = StreamedModel(
        renamed, device=tied.device, dtype=tied.dtype, trust_remote_code=trust_remote_code, config=config
    )
    if model.tied_head is not None:
        raise RecipeError(
            f"{tied.folder}: {model.tied_head} is tied to the input embedding in every {type(config).__name__}, "
            f"and config.json cannot say otherwise ({TIES}); leave --head-bits out"
        )
    return model, renamed, NewConfig(raw)


def _twice(tied: StreamedModel, reader: CheckpointReader) -> dict[str, str]:
    """Every tensor on disk, and those that are not there since they are another's → where it is on disk."""
    names = {key: key for key in reader.keys()}
    for absent, there in tied.tied.items():  # the head, and its bias where that is tied, too
        [names[absent]] = tied.naming.groups[there].keys
    return names
