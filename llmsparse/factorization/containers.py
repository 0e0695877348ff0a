"""Which existing architecture a factorized model becomes, so that transformers loads it with nothing else installed.

A container is named by its `model_type`. It must compute the source's attention, have room for the shared experts, and
weigh the experts that run alike; the table says what each can hold. All weights are written under the names that
released checkpoints of the container use, one tensor for each matrix of each expert.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.factorization.router import Formula
from llmsparse.factorization.split import Layout

SOURCES = ("llama", "mistral", "qwen2", "qwen3")
MIXTURE_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # one in any MoE config
PASSED_ON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)


class Shape(NamedTuple):
    """A source and what becomes of it: `config` of the dense model, numbers of experts, blocks that stay dense."""

    config: Any
    layout: Layout
    kept: Sequence[int]


@dataclass(frozen=True)
class Container:
    """One architecture. Names are within a block; `{}` stands for the number of an expert."""

    name: str
    architecture: str
    formula: Formula
    router: str
    experts: tuple[str, str, str]  # gate, up, down
    fields: Callable[[Shape], dict[str, Any]]  # of its config, beside what all share
    faults: Callable[[Shape], Iterator[str]]  # why it cannot hold a source
    bias: str | None = None  # of the router, for the choice alone
    shared: str | None = None  # prefix of the shared expert
    shared_gate: str | None = None  # a sigmoid on the shared expert; of zeros, so that it is 1/2
    attention_biases: tuple[str, ...] = ()  # that it always has: zeros where the source has none
    ties_head: bool = True  # to the embedding, wherever it is served; where some do not, the head is written out

    def why_not(self, shape: Shape) -> str | None:
        """What keeps it from holding this source, or None."""
        return next(self.faults(shape), None)

    def config(self, shape: Shape) -> Any:
        """The transformers config of the factorized model."""
        from transformers import CONFIG_MAPPING

        fields = {key: getattr(shape.config, key) for key in PASSED_ON}
        fields |= {"head_dim": head_width(shape.config), "rope_parameters": dict(shape.config.rope_parameters)}
        fields |= {"architectures": [self.architecture], "num_experts_per_tok": shape.layout.active}
        fields["tie_word_embeddings"] &= self.ties_head
        return CONFIG_MAPPING[self.name](**fields | self.fields(shape))


def check_source(config: Any, where: str) -> None:
    """CheckpointError, in one line, for a model whose FFNs cannot be factorized."""
    kind = config.model_type
    if any(getattr(config, key, None) for key in MIXTURE_KEYS):
        raise CheckpointError(f"{where}: {kind} is a mixture of experts already; factorize takes a dense model")
    if kind not in SOURCES:
        raise CheckpointError(f"{where}: {kind} cannot be factorized; sources are {', '.join(SOURCES)}")
    if config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(f"{where}: its FFN uses {config.hidden_act}; containers compute silu only")
    if getattr(config, "mlp_bias", False):
        raise CheckpointError(
            f"{where}: its FFN has biases (mlp_bias), which no container has; it cannot be factorized"
        )
    if kind == "llama" and config.attention_bias:
        raise CheckpointError(f"{where}: its attention has an output bias (attention_bias), which no container has")


def choose_container(name: str, shape: Shape) -> Container:
    """The container asked for, or the first that holds the source. RecipeError says why it, or why none, does."""
    if name != "auto":
        container = CONTAINERS[name]
        if fault := container.why_not(shape):
            others = [other for other in CONTAINERS.values() if not other.why_not(shape)]
            reasons = ", ".join(
                f"{other.name} {other.why_not(shape)}" for other in CONTAINERS.values() if other.name != name
            )
            hint = f"use --container {others[0].name}" if others else f"no other container does: {reasons}"
            raise RecipeError(f"--container {name} cannot hold this {shape.config.model_type}: it {fault}; {hint}")
        return container
    for container in CONTAINERS.values():
        if not container.why_not(shape):
            return container
    reasons = ", ".join(f"{container.name} {container.why_not(shape)}" for container in CONTAINERS.values())
    raise RecipeError(f"no container holds this {shape.config.model_type} with these options: {reasons}")


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def windowed(config: Any) -> list[bool]:
    """For each block whether it attends within a sliding window only."""
    if config.model_type == "mistral":
        return [config.sliding_window is not None] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()]


def _glm4_faults(shape: Shape) -> Iterator[str]:
    if any(windowed(shape.config)):
        yield "has no sliding window"
    if shape.config.model_type == "qwen3" and shape.config.attention_bias:
        yield "has no bias behind attention"
    if shape.layout.shared == 0:
        yield "needs a shared slot (--shared 1 or more)"
    if shape.layout.routed < 2:
        yield "needs 2 or more routed experts"
    if list(shape.kept) != list(range(len(shape.kept))):
        yield "keeps only the first blocks dense"


def _glm4_fields(shape: Shape) -> dict[str, Any]:
    layout, kind = shape.layout, shape.config.model_type
    return {
        "intermediate_size": layout.neurons,
        "moe_intermediate_size": layout.width,
        "n_routed_experts": layout.routed,
        "n_shared_experts": layout.shared,
        "first_k_dense_replace": len(shape.kept),
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_mtp_layers": 0,
        "attention_bias": kind == "qwen2",
        "use_qk_norm": kind == "qwen3",
        "partial_rotary_factor": 1.0,
        "rope_parameters": {**shape.config.rope_parameters, "partial_rotary_factor": 1.0},
    }


def _mixtral_faults(shape: Shape) -> Iterator[str]:
    if shape.config.model_type not in ("llama", "mistral"):
        yield f"lacks the attention of {shape.config.model_type}"
    if shape.layout.shared:
        yield "has no shared experts (--shared 0)"
    if shape.kept:
        yield "keeps no block dense"


def _mixtral_fields(shape: Shape) -> dict[str, Any]:
    return {
        "intermediate_size": shape.layout.width,
        "num_local_experts": shape.layout.routed,
        "sliding_window": getattr(shape.config, "sliding_window", None),
    }


def _qwen2_faults(shape: Shape) -> Iterator[str]:
    config = shape.config
    if config.model_type == "qwen3":
        yield "lacks the attention of qwen3"
    if head_width(config) * config.num_attention_heads != config.hidden_size:
        yield "needs heads that add up to the hidden size"
    if shape.layout.shared == 0:
        yield "needs a shared slot (--shared 1 or more)"


def _qwen2_fields(shape: Shape) -> dict[str, Any]:
    layout, sliding = shape.layout, windowed(shape.config)
    window: dict[str, Any] = {"use_sliding_window": any(sliding)}
    if any(sliding):
        window["sliding_window"] = shape.config.sliding_window
        window["layer_types"] = ["sliding_attention" if one else "full_attention" for one in sliding]
    return window | {
        "intermediate_size": layout.neurons,
        "moe_intermediate_size": layout.width,
        "shared_expert_intermediate_size": layout.shared * layout.width,
        "num_experts": layout.routed,
        "norm_topk_prob": True,
        "mlp_only_layers": list(shape.kept),
        "qkv_bias": True,
    }


def _qwen3_faults(shape: Shape) -> Iterator[str]:
    if shape.config.model_type != "qwen3":
        yield f"lacks the attention of {shape.config.model_type}"
    elif any(windowed(shape.config)):
        yield "has no sliding window"
    if shape.layout.shared:
        yield "has no shared experts (--shared 0)"


def _qwen3_fields(shape: Shape) -> dict[str, Any]:
    return {
        "intermediate_size": shape.layout.neurons,
        "moe_intermediate_size": shape.layout.width,
        "num_experts": shape.layout.routed,
        "norm_topk_prob": True,
        "mlp_only_layers": list(shape.kept),
        "attention_bias": shape.config.attention_bias,
    }


_EXPERTS = ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight", "mlp.experts.{}.down_proj.weight")
CONTAINERS = {  # in the order of preference
    "glm4_moe": Container(
        name="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        formula="sigmoid",
        router="mlp.gate.weight",
        bias="mlp.gate.e_score_correction_bias",
        experts=_EXPERTS,
        shared="mlp.shared_experts.",
        ties_head=False,
        fields=_glm4_fields,
        faults=_glm4_faults,
    ),
    "mixtral": Container(
        name="mixtral",
        architecture="MixtralForCausalLM",
        formula="softmax",
        router="block_sparse_moe.gate.weight",
        experts=(
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
            "block_sparse_moe.experts.{}.w2.weight",
        ),
        ties_head=False,
        fields=_mixtral_fields,
        faults=_mixtral_faults,
    ),
    "qwen3_moe": Container(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        formula="softmax",
        router="mlp.gate.weight",
        experts=_EXPERTS,
        fields=_qwen3_fields,
        faults=_qwen3_faults,
    ),
    "qwen2_moe": Container(
        name="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        formula="softmax",
        router="mlp.gate.weight",
        experts=_EXPERTS,
        shared="mlp.shared_expert.",
        shared_gate="mlp.shared_expert_gate.weight",
        attention_biases=tuple(f"self_attn.{name}_proj.bias" for name in "qkv"),
        fields=_qwen2_fields,
        faults=_qwen2_faults,
    ),
}
