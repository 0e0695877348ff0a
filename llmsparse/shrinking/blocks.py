"""Fewer blocks: those that the model can best do without go, the others move up. Lists in config.json that say something of
every layer follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from llmsparse.models.streamed import Block
from llmsparse.shrinking.block_scores import SCORES, STREAM_BYTES, SUFFIX_TOKENS, Removal
from llmsparse.shrinking.depth_config import fields_for_blocks
from llmsparse.shrinking.recipe import ShrinkRecipe, amount_of, refuse_amount
from llmsparse.shrinking.reduction import Cut, Reduction, Source, Specs

if TYPE_CHECKING:
    from llmsparse.runs.run import Run
    from llmsparse.shrinking.plan import ShrinkPlan

FACT = "blocks that go"  # in the journal
Value = TypeVar("Value")


@dataclass(frozen=True)
class Blocks(Reduction):
    """A model with fewer blocks. Until they are chosen, the last ones are taken for those that go."""

    source: Source
    score: str
    kept: tuple[int, ...]  # numbers of the blocks that stay
    fields: dict[str, Any]  # of config.json
    removed: tuple[Removal, ...] = ()  # in the order in which they were chosen

    name = "blocks"
    watches = False

    @property
    def depth(self) -> int:
        """Of the source."""
        return len(self.source.model.block_names)

    def change(self, raw: dict[str, Any]) -> None:
        raw.update(self.fields)

    def survey(self, plan: ShrinkPlan, run: Run) -> Reduction:
        count = self.depth - len(self.kept)
        passes = self.depth if self.score == "influence" else sum(self.depth - gone for gone in range(count))
        advance = run.progress.batches(f"choosing {count} blocks", passes)

        def find() -> dict[str, Any]:
            removed = SCORES[self.score](plan.model, plan.batches, count, advance)
            return {"removed": [asdict(one) for one in removed]}

        removed = tuple(Removal(**one) for one in run.fact(FACT, find)["removed"])
        kept = tuple(index for index in range(self.depth) if index not in {one.index for one in removed})
        return replace(self, kept=kept, fields=fields_for_blocks(self.source, kept), removed=removed)

    def target(self, index: int) -> int | None:
        return self.kept.index(index) if index in self.kept else None

    def resized(self, index: int, specs: Specs) -> Specs:
        return self.renamed(specs)

    def touches(self) -> set[str]:
        """Blocks behind the last one, for multi-token prediction: they stay behind the last one."""
        return {key for key in self.source.model.outside_keys if (_number(key) or 0) >= self.depth}

    def resized_outside(self, specs: Specs) -> Specs:
        return self.renamed(specs)

    def cut_outside(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.renamed(tensors)

    def memory_bytes(self, tokens: int) -> int:
        """Hidden states without one block each."""
        stream = min(tokens, SUFFIX_TOKENS) * self.source.model.hidden_size * self.source.model.dtype.itemsize
        return 2 * stream + min(self.depth * stream, STREAM_BYTES) if self.score == "suffix" else 0

    def begin(self, block: Block) -> Cut:
        return MovedUp(self)

    def renamed(self, items: Mapping[str, Value]) -> dict[str, Value]:
        """By the key in the smaller model."""
        return {self._key(key): value for key, value in items.items()}

    def _key(self, key: str) -> str:
        number = _number(key)
        if number is None:
            return key
        new = number - self.depth + len(self.kept) if number >= self.depth else self.kept.index(number)
        parts = key.split(".")
        parts[parts.index(str(number))] = str(new)
        return ".".join(parts)

    def describe(self) -> str:
        text = f"{len(self.kept)} of {self.depth} blocks stay, by {self.score}"
        return f"{text}; {spell(self.removed)} went" if self.removed else text


@dataclass(frozen=True)
class MovedUp(Cut):
    """A block that stays, under its new number."""

    plan: Blocks

    def cut(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.plan.renamed(tensors)


def plan(recipe: ShrinkRecipe, source: Source) -> Reduction:
    """A model of as many blocks as the recipe says. RecipeError or CheckpointError where that cannot be."""
    assert recipe.blocks is not None
    depth = len(source.model.block_names)
    count = amount_of(recipe.blocks, depth)
    refuse_amount("blocks", recipe.blocks, count, depth)
    if count > 1:
        fields_for_blocks(source, [0, *range(depth - count + 1, depth)])  # also where those in the middle go
    kept = tuple(range(count))
    return Blocks(source, recipe.block_score, kept, fields_for_blocks(source, kept))


def spell(removed: Sequence[Removal]) -> str:
    """The numbers of the blocks that go, in order."""
    return ", ".join(str(one.index) for one in sorted(removed, key=lambda one: one.index))


def _number(key: str) -> int | None:
    """The number of the block that an on-disk key belongs to: the first number in it."""
    return next((int(part) for part in key.split(".") if part.isdecimal()), None)
