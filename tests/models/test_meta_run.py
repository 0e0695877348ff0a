"""What can be streamed is told from what cannot, and matrices from other parameters, without a tensor being read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import random_model, stream, tiny_config
from torch import Tensor, nn

from llmsparse.errors import CheckpointError
from llmsparse.models.empty_model import find_blocks
from llmsparse.models.meta_run import MetaRun, run_on_meta


class Down(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 8))  # laid out (in, out), and square


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 8)
        self.down = Down()
        self.experts = nn.Parameter(torch.empty(3, 8, 8))
        self.table = nn.Parameter(torch.empty(8, 4))
        self.conv = nn.Conv1d(8, 8, 3)

    def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Any:
        assert not any(part.is_meta for part in (self.norm.bias, self.conv.weight, self.table))  # a kernel reads them
        mixed = self.up(self.norm(hidden_states)) @ self.down.weight
        for expert in (torch.rand(3) >= 0).nonzero().flatten():  # a loop over what only values tell
            mixed = mixed + F.linear(mixed, self.experts[expert])
        return hidden_states + mixed * self.table.sum()


class Model(nn.Module):
    """A stack of blocks; `way` names what else it does."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        with torch.device("meta"):
            self.embedding = nn.Embedding(11, 8)
            self.layers = nn.ModuleList(Block() for _ in range(3))
            self.head = nn.Linear(8, 11, bias=False)
        self.way = way
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=3), name_or_path="toy")
        self._no_split_modules = None

    def get_decoder(self) -> nn.Module:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor, use_cache: bool) -> Any:
        embedded = hidden = self.embedding(ids)
        first = extra = None
        for block in self.layers:
            hidden = block(hidden, extra)
            if self.way in ("tuple", "list"):
                hidden = hidden[0]
            if self.way == "scales":
                hidden = hidden * 0.5
            extra = {"adds": hidden, "embedding": embedded}.get(self.way)
            first = hidden if first is None else first
        if self.way == "skips":
            hidden = hidden + embedded
        if self.way == "averages" and first is not None:
            hidden = hidden + first
        return SimpleNamespace(logits=self.head(hidden))


class Wrapped(Block):
    kind: Any = tuple

    def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Any:
        return self.kind([super().forward(hidden_states), None, "weights"])


def sketch(model: Model) -> MetaRun:
    return run_on_meta(model, list(model.layers), torch.device("cpu"))  # pyright: ignore[reportArgumentType]


def test_matrices_and_their_layout_are_what_the_code_does_with_them() -> None:
    found = sketch(Model())
    assert {name: flag for name, flag in found.transposed.items() if name.startswith("layers.1.")} == {
        "layers.1.up.weight": False,
        "layers.1.down.weight": True,
        "layers.1.experts": False,
    }
    assert list(found.transposed)[-1] == "head.weight"


def test_the_model_is_left_on_meta() -> None:
    model = Model()
    before = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
    sketch(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()} == before


class Mixture(Block):
    """Experts of their own, of which zeros reach only the first."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(8, 4), "w2": nn.Linear(4, 8)}) for _ in range(12))

    def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Any:
        part = self.parts[int(hidden_states.sum() > 1)]
        return super().forward(hidden_states) + part["w2"](part["w1"](hidden_states))


def test_what_holds_for_one_expert_holds_for_all() -> None:
    model = Model()
    with torch.device("meta"):
        model.layers = nn.ModuleList(Mixture() for _ in range(3))
    found = [name for name in sketch(model).transposed if name.startswith("layers.2.parts.")]
    assert found == [f"layers.2.parts.{part}.{w}.weight" for w in ("w1", "w2") for part in range(12)]


@pytest.mark.parametrize("kind", [tuple, list])
def test_the_container_of_a_block_is_the_one_it_returns(kind: Any) -> None:
    model = Model(kind.__name__)
    with torch.device("meta"):
        model.layers = nn.ModuleList(Wrapped() for _ in range(3))
    for block in model.layers:
        block.kind = kind
    hidden = torch.ones(1)
    assert sketch(model).wrap(hidden) == kind([hidden, None, None])
    assert sketch(Model()).wrap(hidden) is hidden


@pytest.mark.parametrize(
    ("way", "fault"),
    [
        ("scales", "changes the hidden states between its blocks"),
        ("adds", "gives a block more of an earlier one"),
        ("skips", "computes its logits from the embedding past the last block"),
        ("averages", "computes its logits from the blocks past the last block"),
    ],
)
def test_more_than_a_stack_of_blocks_is_refused(way: str, fault: str) -> None:
    with pytest.raises(CheckpointError, match=fault):
        sketch(Model(way))


def test_blocks_may_be_called_with_the_embedding_too() -> None:
    assert sketch(Model("embedding")).transposed


def test_a_model_without_a_list_of_the_depth_of_its_config_is_refused() -> None:
    model: Any = Model()
    assert find_blocks(model)[0] == "layers"
    model.layers.append(Block())
    with pytest.raises(CheckpointError, match="has no list of 3 blocks"):
        find_blocks(model)


def test_of_two_lists_of_the_same_length_the_declared_one_is_taken() -> None:
    model: Any = Model()
    model.layers = nn.ModuleDict({"adapters": nn.ModuleList(nn.Linear(1, 1) for _ in range(3)), "blocks": model.layers})
    assert find_blocks(model)[0] == "layers.adapters"
    model._no_split_modules = ["Block"]
    assert find_blocks(model)[0] == "layers.blocks"


def test_a_config_that_contradicts_itself_is_one_line(tmp_path: Path) -> None:
    config = tiny_config("deepseek_v3", num_key_value_heads=2)  # of 4 heads; latent attention has no groups of them
    random_model(config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="DeepseekV3ForCausalLM does not run with the sizes in its config"
    ) as error:
        stream(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
