"""Fewer blocks: those that the model can best do without go, the others move up. Lists in config.json that say something of
every layer follow. The block before a gap takes over what it can of those that went (`folding.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from llmsparse.models.activations import Call
from llmsparse.models.streamed import Activations, Block
from llmsparse.ranks.group import ALONE, Ranks
from llmsparse.ranks.share import Share
from llmsparse.shrinking.block_scores import SCORES, STREAM_BYTES, Removal, shapes_measured
from llmsparse.shrinking.depth_config import fields_for_blocks
from llmsparse.shrinking.folding import Folded, fold
from llmsparse.shrinking.recipe import ShrinkRecipe, amount_of, refuse_amount
from llmsparse.shrinking.reduction import Cut, Reduction, Rows, Source, Specs

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
    folds: bool = False  # the block before a gap is fitted to what came behind it
    removed: tuple[Removal, ...] = ()  # in the order in which they were chosen
    batches: Sequence[Tensor] = ()  # of calibration
    ranks: Ranks = ALONE

    name: ClassVar[str] = "blocks"

    @property
    def watches(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.folds

    @property
    def depth(self) -> int:
        """Of the source."""
        return len(self.source.model.block_names)

    def change(self, raw: dict[str, Any]) -> None:
        raw.update(self.fields)

    def survey(self, plan: ShrinkPlan, run: Run[Any]) -> Reduction:
        count = self.depth - len(self.kept)
        passes = self.depth if self.score == "influence" else sum(self.depth - gone for gone in range(count))
        advance = run.progress.batches(f"choosing {count} blocks", passes)

        def find() -> dict[str, Any]:
            removed = SCORES[self.score](plan.model, plan.batches, count, advance, plan.ranks)
            return {"removed": [asdict(one) for one in removed]}

        removed = tuple(Removal(**one) for one in run.fact(FACT, find)["removed"])
        kept = tuple(index for index in range(self.depth) if index not in {one.index for one in removed})
        with plan.ranks.together():
            fields = fields_for_blocks(self.source, kept)
        return replace(self, kept=kept, fields=fields, removed=removed, batches=plan.batches, ranks=plan.ranks)

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

    def memory_bytes(self, share: Share) -> int:
        """Hidden states without one block each."""
        tokens = Share(share.ranks, tuple(shapes_measured(share.shapes))).most_tokens
        stream = tokens * self.source.model.hidden_size * self.source.model.dtype.itemsize
        return 2 * stream + min(self.depth * stream, STREAM_BYTES) if self.score == "suffix" else 0

    def begin(self, block: Block) -> Cut:
        return MovedUp(self, block.index)

    def gap(self, index: int) -> list[int]:
        """The blocks right behind a block that go."""
        return list(takewhile(lambda number: number not in self.kept, range(index + 1, self.depth)))

    @cached_property
    def calls(self) -> list[list[Call]]:
        """What the source's blocks are called with for the batches held here, besides hidden states."""
        return self.source.model.embed(self.batches, self.ranks).calls

    def beyond(self, index: int, outputs: list[Tensor]) -> list[Tensor]:
        """Outputs of block `index` taken through the gap behind it; one of its blocks is in memory at a time."""
        acts = Activations(list(outputs), self.calls)
        for number in self.gap(index):
            with self.ranks.together():
                block = self.source.model.block(number)
            block.run(acts, into=acts)
            block.evict()
        return acts.hidden

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

    def findings(self, rows: Rows) -> list[tuple[str, str]]:
        errors = [row["folded"]["error"] for _, row in rows if row["folded"]]
        taken = f"; {1 - sum(errors) / len(errors):.0%} of what they added is taken over" if errors else ""
        return [(self.name, self.describe() + taken)]


class MovedUp(Cut):
    """A block that stays, under its new number."""

    def __init__(self, plan: Blocks, index: int) -> None:
        self._plan, self._index = plan, index
        self._gap = plan.gap(index)
        self._folded: Folded | None = None

    def cut(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._plan.renamed(tensors)

    def aim(self, outputs: list[Tensor]) -> list[Tensor]:
        return self._plan.beyond(self._index, outputs) if self._gap else outputs

    def refit(self, made: Block, acts: Activations) -> None:
        if self._gap:
            beyond = partial(self._plan.beyond, self._index)
            self._folded = fold(made, acts, beyond, self._plan.source.model.hidden_size)

    def row(self) -> dict[str, Any]:
        if not self._gap:
            return {}
        return {"gap": self._gap, "folded": self._folded.to_json() if self._folded else None}


def plan(recipe: ShrinkRecipe, source: Source) -> Reduction:
    """A model of as many blocks as the recipe says. RecipeError or CheckpointError where that cannot be."""
    assert recipe.blocks is not None
    depth = len(source.model.block_names)
    count = amount_of(recipe.blocks, depth)
    refuse_amount("blocks", recipe.blocks, count, depth)
    if count > 1:
        fields_for_blocks(source, [0, *range(depth - count + 1, depth)])  # also where those in the middle go
    kept = tuple(range(count))
    return Blocks(source, recipe.block_score, kept, fields_for_blocks(source, kept), recipe.refit)


def spell(removed: Sequence[Removal]) -> str:
    """The numbers of the blocks that go, in order."""
    return ", ".join(str(one.index) for one in sorted(removed, key=lambda one: one.index))


def _number(key: str) -> int | None:
    """The number of the block that an on-disk key belongs to: the first number in it."""
    return next((int(part) for part in key.split(".") if part.isdecimal()), None)
