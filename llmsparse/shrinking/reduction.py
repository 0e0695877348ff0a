"""What every way to make a model smaller has in common: experts, blocks, ffn and heads are one each.

A reduction is made by its file's `plan(recipe, source)`, which refuses in one line what cannot be, from config and shapes
alone. It then says

1. `change`: which fields of config.json have other values;
2. `resized`: which tensors of a block there will be, of which name and shape (`resized_outside` the same for
   tensors of no block);
3. `target`: which block of the made model a block becomes, None where it goes;
4. `survey`: where shapes depend on the data (which blocks go), what it found, before the first file is made;
5. `begin`: what it does with one block: watch the calibration batches run through it whole, cut its tensors, and fit what
   is left; `row` is what the report keeps of that;
6. `findings` and `warnings`: what the report says of all rows.

Tensors are cut in the disk's space, under the source's names, by each reduction in turn (`reductions.ORDER`): heads and ffn
see every expert under its own number, experts renumber what they keep, blocks rename last. All of them watch one and
the same pass of the whole block; what they fit afterwards is fitted on the block as it was made, in the same order.
Of several processes each watches its own batches; what they sum up is added up in the tree of `ranks/tree.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from llmsparse.models.streamed import Activations, Block, StreamedModel
from llmsparse.ranks.group import Ranks
from llmsparse.ranks.share import Share
from llmsparse.storage.checkpoint import CheckpointReader

if TYPE_CHECKING:
    from llmsparse.runs.run import Run
    from llmsparse.shrinking.plan import ShrinkPlan

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]  # on-disk key → shape, dtype
Rows = Sequence[tuple[str, Mapping[str, Any]]]  # (block name, what `Cut.row` said of it)


@dataclass(frozen=True)
class Source:
    """The model to shrink, as far as a plan knows it."""

    model: StreamedModel
    reader: CheckpointReader
    raw: dict[str, Any]  # its config.json
    trust_remote_code: bool = False

    @property
    def where(self) -> str:
        return str(self.reader.folder)


class Sum(Protocol):
    """What some batches leave behind, to be added up."""

    def merge(self, other: Any) -> Any:
        """This, with what later batches left, which is let go of."""
        ...


class Cut:
    """One reduction at work on one block. The defaults do nothing: a block that it leaves as it is.

    All processes call the same methods in the same order; `watching` and `watched` are of the batches that one has.
    """

    watches: bool = False  # it wants to see the calibration batches run

    def learn(self, acts: Activations, aims: Activations | None) -> None:
        """Find out what has to be known before the batches run; `acts` enter the whole block."""

    def owners(self, ranks: Ranks) -> list[int]:
        """For each sum the process that is to have it."""
        return []

    def begin_sums(self, leaf: int) -> Sequence[Sum]:
        """From here on other sums, those of this leaf of the tree."""
        return []

    def watching(self, batch: int) -> AbstractContextManager[None]:
        """Open while calibration batch number `batch`, among those of all processes, runs through the whole block."""
        return nullcontext()

    def watched(self, output: Tensor, aim: Tensor | None) -> None:
        """Called behind each batch with what the whole block made of it, and with what the source's own made, behind its own
        blocks, where the made block should come to that; (batch, tokens, width)."""

    def take_sums(self, totals: Sequence[Any]) -> None:
        """Of all batches, None where another process has one; called once, when all batches have run."""

    def cut(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """On-disk tensors of the block → those that stay; called once, behind that. Shapes, dtypes and
        names are those of `Reduction.resized`. Never writes into the tensors that it is given."""
        return tensors

    def aim(self, outputs: list[Tensor]) -> list[Tensor]:
        """What the made block's outputs are to come to, one (batch, tokens, width) a batch held here: those of the whole
        block, which are given, or more."""
        return outputs

    def refit(self, made: Block, acts: Activations) -> None:
        """Improve the block as it was made in `made.stored`, and `made.reload()`, if what it does comes closer to what was
        watched; `acts` enter it, the batches that were watched. Only where the recipe asks for refit."""

    def row(self) -> dict[str, Any]:
        """What the journal and the report keep, JSON-able; {} where the block was left as it is."""
        return {}


class Reduction(ABC):
    """One way to make a model smaller."""

    name: ClassVar[str]  # its key in the recipe
    watches: bool = True  # some of its cuts do
    aims: ClassVar[bool] = False  # its cuts and what is fitted after them go by what the source's own blocks make

    @abstractmethod
    def change(self, raw: dict[str, Any]) -> None:
        """Write what changes into a config.json, which the reductions before it have changed already."""

    def survey(self, plan: ShrinkPlan, run: Run[Any]) -> Reduction:
        """The same reduction once all is known that the shapes of the result depend on; what it finds goes into
        `run.fact`, so that a resumed run does not look again."""
        return self

    def target(self, index: int) -> int | None:
        """The number of the block that block `index` becomes; None where it is taken out."""
        return index

    def resized(self, index: int, specs: Specs) -> Specs:
        """What is written of block `index`, of the specs that the reductions before leave of it."""
        return specs

    def touches(self) -> set[str]:
        """On-disk keys of no block, such as those of a block for multi-token prediction, that it cuts too."""
        return set()

    def resized_outside(self, specs: Specs) -> Specs:
        """As `resized`, for what is touched outside the blocks by this reduction or by another."""
        return specs

    def cut_outside(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Cut.cut`, for the same."""
        return tensors

    @abstractmethod
    def begin(self, block: Block) -> Cut:
        """Start work on a block, which is loaded whole."""

    def memory_bytes(self, share: Share) -> int:
        """What a process holds beside a block while that is worked on, for these calibration batches."""
        return 0

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one it resumes, beside the recipe: checksums of files that it names."""
        return {}

    @abstractmethod
    def describe(self) -> str:
        """What it does to this model, for the plan: "96 of 128 experts stay in each of 48 layers, by hope"."""

    def findings(self, rows: Rows) -> list[tuple[str, str]]:
        """Lines of the summary."""
        return [(self.name, self.describe())]

    def warnings(self, rows: Rows) -> list[str]:
        """What a user should know."""
        return []
