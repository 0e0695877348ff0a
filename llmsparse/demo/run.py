"""What llmsparse does, shown on the embedded model in about two minutes on a laptop's CPU, with no download.

Every method prunes the same model to the same sparsity from the same text, and each result is measured on modules of
the standard library that neither training nor calibration saw. The last result is then packed: what that saves on disk,
and how fast it runs from there.
"""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmsparse.demo import size_and_speed
from llmsparse.demo.size_and_speed import SizeAndSpeed
from llmsparse.evaluation.perplexity import perplexity
from llmsparse.models.origin import BUILTIN_FOLDER
from llmsparse.pruning.pipeline import prune
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.runs.progress import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

SPARSITY = 0.6
CALIBRATION_WINDOWS = 32
EVALUATION_WINDOWS = 32
SEQ_LEN = 256
PROMPT = "def "
RUNS = (  # label, method, block matching steps
    ("magnitude", "magnitude", 0),
    ("wanda", "wanda", 0),
    ("dsnot", "dsnot", 0),
    ("sparsegpt", "sparsegpt", 0),
    ("alps", "alps", 0),
    ("sparsegpt + matching", "sparsegpt", 40),
)


@dataclass(frozen=True)
class DemoRow:
    label: str
    sparsity: float
    perplexity: float
    seconds: float
    text: str  # greedy continuation of PROMPT


@dataclass(frozen=True)
class Demo:
    """The tables of the demo: every method, the dense model first; and what packing the last of them pays."""

    rows: list[DemoRow]
    protocol: dict[str, Any]
    payoff: SizeAndSpeed

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("method", "sparsity", "perplexity", "seconds", box=None, pad_edge=False)
        for row in self.rows:
            table.add_row(row.label, f"{row.sparsity:.2f}", f"{row.perplexity:.2f}", f"{row.seconds:.1f}")
        text = self.protocol.get("text", "builtin")
        table.caption = f"perplexity per token on the {text}: {EVALUATION_WINDOWS} windows of {SEQ_LEN} tokens"
        table.caption_justify = "left"
        texts = [Text(f"\n{row.label}:\n{row.text}") for row in (self.rows[0], self.rows[-1])]
        packed = Text(f"\n{self.payoff.label}, from its packed form:\n{self.payoff.text}\n")
        return Group(table, *texts, packed, self.payoff.table())


def run(progress: Progress | None = None) -> Demo:
    """Prune the embedded model by every method; the folders are temporary."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="llmsparse-demo-") as scratch:

        def pruned(label: str) -> Path:
            return Path(scratch) / label.replace(" ", "")

        def measure(label: str, folder: Path, sparsity: float, seconds: float) -> tuple[DemoRow, dict[str, Any]]:
            result = perplexity(
                str(folder), "builtin", seq_len=SEQ_LEN, windows=EVALUATION_WINDOWS, device=device, dtype="float32"
            )
            return DemoRow(label, sparsity, result.perplexity, seconds, _continue(folder)), result.protocol

        def rows() -> Iterator[tuple[DemoRow, dict[str, Any]]]:
            yield measure("dense", BUILTIN_FOLDER, 0.0, 0.0)
            for label, method, steps in RUNS:
                recipe = PruneRecipe(
                    model=str(BUILTIN_FOLDER),
                    output=str(pruned(label)),
                    method=method,
                    sparsity=SPARSITY,
                    calibration="builtin",
                    calibration_samples=CALIBRATION_WINDOWS,
                    seq_len=SEQ_LEN,
                    match_steps=steps,
                    device=device,
                    dtype="float32",
                )
                report = prune(recipe, progress=progress)
                yield measure(label, Path(report.output), report.sparsity, report.seconds)

        measured = list(rows())
        last = RUNS[-1][0]
        pays = size_and_speed.size_and_speed(last, pruned(last), Path(scratch) / "packed")
    return Demo([row for row, _ in measured], measured[0][1], pays)


def _continue(folder: Path, tokens: int = 48) -> str:
    """The model's greedy continuation of PROMPT, by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)
