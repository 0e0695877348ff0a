"""Every architecture that transformers knows as a causal language model, or as one that wraps one, made tiny and tried.

    python tests/every_architecture.py      writes docs/models.md

A tiny config is the family's own with its sizes made small, by the names that such fields have.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    PretrainedConfig,
)
from transformers.utils import logging
from wrapped import WRAPPED

from llmsparse.errors import LlmsparseError, one_line
from llmsparse.models.origin import load_config
from llmsparse.models.prunable import refuse_flat_experts
from llmsparse.models.streamed import StreamedModel
from llmsparse.storage.checkpoint import CheckpointReader

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
PREAMBLE = """# Models

Every family that transformers {version} knows as a causal language model, or as a model that wraps one (it reads images or
sound besides), was made tiny, given random weights, and streamed block by block on text. There is no code for any of them.
{families} families: {summary}.

- **works**: the streamed logits are those of the whole model in plain transformers, and every matrix of its blocks has a
  name, an input and a place on disk. Of a model that wraps a language model, the language model is pruned where it
  lies, under its own names; everything else stays the same bytes, and the result loads in the class named here.
- **refused**: one line before anything is computed, since streaming would lose what passes the blocks by.
- **not tried**: the family's sizes go by names that a generic tiny config does not know, it needs a package that is not
  installed, or takes no text alone. It may well work; `llmsparse plan MODEL` says so from the config and headers.

Written by `python tests/every_architecture.py`, checked by the slow tests.

"""
VOCABULARY, WIDTH, HEADS = 128, 32, 4
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "embedding_size", "out_hidden_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "d_head"), 8),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "intermediate_size_mlp", "dense_size"),
        48,
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_seq_len"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "word_embed_proj_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "num_mel_bins": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 8,
}


OTHERS = {"EvollaModel", "evolla", "shieldgemma2"}  # a second name, proteins, a classifier of images
VARIANTS: tuple[dict[str, Any], ...] = (  # of the sizes, tried in turn until a model runs
    {},
    {"num_key_value_heads": HEADS},
    {"mrope_section": [1, 1, 2]},
    {"mrope_section": [1, 1, 2], "num_key_value_heads": HEADS},
    {"layer_types": None},
    {"head_dim": None},
    {"head_dim": 16, "rotary_dim": 8, "num_key_value_heads": HEADS},
    {"rotary_dim": 4},
    {"num_experts_per_tok": 1},
    {"mamba_n_heads": 4, "mamba_d_head": 16, "num_heads": 4, "hidden_size_per_layer_input": 0},
    {"num_hidden_layers": 4},
)


def shrunk(config: PretrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config with its sizes made small; of the configs inside it too."""
    sizes = SIZES | changes
    fields = dict[str, Any]()
    for name, value in config.to_dict().items():
        if name in config.sub_configs and isinstance(inside := getattr(config, name), PretrainedConfig):
            fields[name] = shrunk(inside, changes) | ({"model_type": inside.model_type} if inside.model_type else {})
        elif name == "rope_parameters" and isinstance(value, dict):
            fields[name] = value | {key: changes[key] for key in ("mrope_section",) if key in changes}
        elif name in ("layer_types", "layers_block_type", "mlp_layer_types") and isinstance(value, list) and value:
            kinds = list(dict.fromkeys(value))
            fields[name] = changes.get(name, (kinds * 4)[: sizes["num_hidden_layers"]])
        elif name in sizes and isinstance(value, int | type(None)) and not isinstance(value, bool):
            fields[name] = sizes[name]
    return fields


def tiny(kind: str, changes: dict[str, Any]) -> PretrainedConfig:
    """A tiny config of a family."""
    config_class: Any = CONFIG_MAPPING[kind]
    known = (ARCHITECTURES | WRAPPED).get(kind)
    return config_class(**known) if known else config_class(**shrunk(config_class(), changes))


def family(kind: str) -> Any:
    """The class of its model: the one that wraps a language model where there are both."""
    config_class = CONFIG_MAPPING[kind]
    return MODEL_FOR_MULTIMODAL_LM_MAPPING.get(config_class, None) or MODEL_FOR_CAUSAL_LM_MAPPING.get(
        config_class, None
    )


def families() -> list[str]:
    """Every `model_type` that has a causal language model, or one that wraps one."""
    return sorted(kind for kind in CONFIG_MAPPING if family(kind) is not None and kind not in OTHERS)


@torch.no_grad()
def verdict(kind: str, folder: Path) -> str:
    """`works` where the streamed logits are those of the whole model, else what llmsparse says, or that no tiny model of
    the family could be made."""
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    reason = ""
    for changes in VARIANTS:
        torch.manual_seed(0)
        try:
            config = tiny(kind, changes)
            config.architectures = [family(kind).__name__]
            config.save_pretrained(folder)
            load_config(folder)
            model = family(kind)(config).eval()
            if sum(parameter.numel() for parameter in model.parameters()) > 30_000_000:
                return "not tried: no tiny config could be made of its fields"
            model.set_experts_implementation("eager")
            whole: Tensor = model(input_ids=ids).logits
            model.save_pretrained(folder)
            break
        except LlmsparseError as error:
            return f"refused: {str(error).rpartition('config.json: ')[2]}"
        except Exception as error:  # whatever a family that cannot be made tiny this way raises
            needs = str(error).partition("requires the ")[2].partition(" ")[0]
            reason = reason or (f"it needs {needs}" if needs else "no tiny config could be made of its fields")
            if "pixel_values" in str(error) or "input_features" in str(error):
                reason = "it takes no text alone"
    else:
        return f"not tried: {reason}"
    try:
        streamed = StreamedModel(CheckpointReader(folder), device=torch.device("cpu"), dtype=torch.float32)
        refuse_flat_experts(streamed)
        list(streamed.matrices())
    except LlmsparseError as error:
        return f"refused: {str(error).removeprefix(f'{folder}: ')}"
    acts = streamed.embed([ids])
    for block in streamed.blocks():
        acts = block.run(acts)
    logits = streamed.logits(acts.hidden[0])
    return "works" if torch.allclose(logits, whole) else f"differs by {(logits - whole).abs().max().item():.2g}"


def tried(kind: str) -> str:
    """`verdict`, and what goes wrong besides."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            return verdict(kind, Path(folder))
        except Exception as error:
            return f"fails: {type(error).__name__}: {one_line(error)[:120]}"
        finally:
            logging.set_verbosity(verbosity)
            logging.enable_progress_bar()


def row(kind: str, said: str) -> str:
    """A line of the page's table."""
    return f"| `{kind}` | {family(kind).__name__} | {said} |"


def page(verdicts: dict[str, str]) -> str:
    """docs/models.md."""
    counts = Counter(said.partition(":")[0] for said in verdicts.values())
    summary = ", ".join(f"{counts[name]} {name}" for name in ("works", "refused", "not tried"))
    return PREAMBLE.format(version=transformers.__version__, families=len(verdicts), summary=summary) + "\n".join(
        ["| model_type | class | |", "|---|---|---|", *(row(kind, said) for kind, said in verdicts.items()), ""]
    )


if __name__ == "__main__":
    found = {kind: tried(kind) for kind in families()}
    PAGE.write_text(page(found), encoding="utf-8")
    print("\n".join(row(kind, said) for kind, said in found.items() if said != "works"))
