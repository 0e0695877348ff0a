"""Calibrated on the model's own text, on a foreign text, on what the model writes itself, and on mixes: perplexity by text.

`python -m eval.selfcalibration DATA [--only stories260K,…] [--seeds 0,1,2] [--part sources|windows|temperature|starts]`

SparseGPT at 70 % with short matching. DATA holds `models/stories260K`, `models/babyllama-tok361` and `data/tinystories.txt`,
`wikitext2-valid.txt`, `sherlock.txt`; the embedded model and the text of Python's library are here already. Of a file the
first four fifths are calibrated on and the last is measured; all windows of one run have one length. `own` is what the
model was made for (TinyStories, or Python), `foreign` is WikiText-2, which none of them has seen, as C4 would be to a
model of code; Sherlock Holmes is calibrated on by none.

Rows are appended to eval/results/selfcalibration.csv as they are measured; what stands there is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save_file

import llmsparse
from llmsparse.models.origin import fetch_model, load_config, load_tokenizer
from llmsparse.models.streamed import StreamedModel
from llmsparse.models.writing import Chooser, write_whole
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.text.own_text import FREE, Starts

RESULTS = Path(__file__).parent / "results" / "selfcalibration.csv"
SPARSITY, MATCH_STEPS, LENGTH = 0.7, 40, 256
EVALUATED = 48  # windows of each text
FILES = {"tinystories": "tinystories.txt", "wikitext2": "wikitext2-valid.txt", "sherlock": "sherlock.txt"}
MODELS = {"embedded": "builtin", "stories260K": "models/stories260K", "babyllama": "models/babyllama-tok361"}
OWN = {"embedded": "python", "stories260K": "tinystories", "babyllama": "tinystories"}


@dataclass(frozen=True)
class Setting:
    """What a model is calibrated on: shares of `own`, `foreign` and `self`, each window of the last written so."""

    calibrated_on: str
    windows: int = 64
    temperature: float = 1.0
    random_starts: bool = True
    seed: int = 0


PARTS = {
    "sources": [Setting(kind) for kind in ("own", "foreign", "self", "own+self", "foreign+self")],
    "windows": [Setting(kind, windows) for windows in (16, 256) for kind in ("own", "self", "own+self")],
    "temperature": [Setting("self", temperature=t) for t in (0.7, 0.85, 1.2)],
    "starts": [Setting("self", random_starts=False)],
}


@dataclass(frozen=True)
class Row(Setting):
    """The perplexity of one text, dense and pruned."""

    model: str = ""
    match_steps: int = MATCH_STEPS
    evaluated_on: str = ""
    dense: float = 0.0
    perplexity: float = 0.0
    seconds: float = 0.0


class Bench:
    """A model, its texts cut in two, and the windows that it wrote."""

    def __init__(self, name: str, data: Path, scratch: Path) -> None:
        self.name, self.scratch = name, scratch
        self.model = MODELS[name] if name == "embedded" else str(data / MODELS[name])
        self.texts: dict[str, tuple[str, str]] = {"python": ("builtin", "builtin")}
        for text, file in FILES.items():
            whole = (data / "data" / file).read_text(encoding="utf-8")
            cut = len(whole) * 4 // 5
            for part, content in (("train", whole[:cut]), ("test", whole[cut:])):
                (scratch / f"{text}.{part}.txt").write_text(content, encoding="utf-8")
            self.texts[text] = (str(scratch / f"{text}.train.txt"), str(scratch / f"{text}.test.txt"))
        self.dense = {text: self.measure(self.model, text) for text in self.texts}

    def measure(self, model: str, text: str) -> float:
        return llmsparse.perplexity(model, self.texts[text][1], seq_len=LENGTH, windows=EVALUATED).perplexity

    def rows(self, setting: Setting) -> Iterator[Row]:
        started = time.process_time()
        named = {"own": self.texts[OWN[self.name]][0], "foreign": self.texts["wikitext2"][0]}
        kinds = setting.calibrated_on.split("+")
        sources = [self.written(setting) if kind == "self" else named[kind] for kind in kinds]
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            report = llmsparse.prune(
                self.model, output=f"{folder}/pruned", sparsity=SPARSITY, match_steps=MATCH_STEPS, seq_len=LENGTH,
                calibration=sources, calibration_samples=setting.windows, seed=setting.seed,
            )  # fmt: skip
            seconds = time.process_time() - started
            for text, dense in self.dense.items():
                found = self.measure(report.output, text)
                yield Row(**asdict(setting), model=self.name, evaluated_on=text, dense=dense, perplexity=found,
                          seconds=round(seconds, 1))  # fmt: skip

    def written(self, setting: Setting) -> str:
        """A file of windows that the model wrote, and eight more, which are held out."""
        file = self.scratch / f"self-{setting.windows}-{setting.temperature}-{setting.random_starts}-{setting.seed}"
        folder = fetch_model(self.model, None)
        model = StreamedModel(CheckpointReader(folder), device=torch.device("cpu"), dtype=torch.float32)
        config = load_config(folder)
        starts = Starts.find(load_tokenizer(folder), config, model.vocabulary, self.name)
        prefixes = starts.prefixes(setting.windows + 32, setting.seed)
        if not setting.random_starts:
            prefixes[:, 1:] = FREE
        generator = torch.Generator().manual_seed(setting.seed)
        chooser = Chooser(prefixes, setting.temperature, generator, starts.first, starts.end)
        save_file({"input_ids": write_whole(model, chooser, LENGTH)}, f"{file}.safetensors")
        return f"{file}.safetensors"


def known() -> list[dict[str, str]]:
    if not RESULTS.is_file():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def append(rows: list[Row]) -> None:
    new = not RESULTS.is_file()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(
            [asdict(row) | {"perplexity": f"{row.perplexity:.4f}", "dense": f"{row.dense:.4f}"} for row in rows]
        )


def measured(model: str, setting: Setting) -> bool:
    wanted = {key: str(value) for key, value in asdict(setting).items()} | {"model": model}
    return any(all(row[key] == value for key, value in wanted.items()) for row in known())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--part", default=",".join(PARTS))
    asked = parser.parse_args()
    settings = [
        Setting(**asdict(setting) | {"seed": int(seed)})
        for part in asked.part.split(",")
        for seed in asked.seeds.split(",")
        for setting in PARTS[part]
    ]
    for name in asked.only.split(","):
        left = [setting for setting in settings if not measured(name, setting)]
        if not left:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(name, asked.data, Path(scratch))
            for setting in left:
                rows = list(bench.rows(setting))
                append(rows)
                found = ", ".join(f"{row.evaluated_on} {row.perplexity:.2f} ({row.dense:.2f})" for row in rows)
                print(f"{name}, {setting}: {found}, {rows[0].seconds} s", flush=True)


if __name__ == "__main__":
    main()
