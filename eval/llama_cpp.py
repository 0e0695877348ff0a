"""llama.cpp's library as a rival: its programs built from its source tree, and its quantizer on a Llama of ours.

The tree has its libraries in build/bin, and the package gguf. The importance of a column is the mean square of what enters it,
over the calibration that `llmsparse quantize` has, which is what llama.cpp's own program collects. Embedding and head stay as they
are, as for all that `eval.frontier` compares.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from llmsparse.calibration.inputs import calibrate, learn_inputs
from llmsparse.models.origin import load_tokenizer
from llmsparse.models.streamed import StreamedModel
from llmsparse.runs.device import split_batches
from llmsparse.sparsity.stats import InputNorm
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.text.windows import load_windows

HERE = Path(__file__).parent
KINDS = {  # as enum llama_ftype
    "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K": 10, "IQ3_XXS": 23, "Q3_K_M": 12, "Q4_K_M": 15, "Q8_0": 7,
}  # fmt: skip


class LlamaCpp:
    """The programs of its library, built into `folder`."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.libraries, self._source, self._folder = source / "build" / "bin", source, folder
        if str(source / "gguf-py") not in sys.path:
            sys.path.insert(0, str(source / "gguf-py"))

    def built(self, name: str) -> Path:
        """The program of eval/NAME.c."""
        program = self._folder / name
        includes = [f"-I{self._source / part}" for part in ("include", "ggml/include")]
        libraries = [f"-L{self.libraries}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{self.libraries}"]
        subprocess.run(["cc", "-O2", *includes, str(HERE / f"{name}.c"), "-o", str(program), *libraries], check=True)
        return program

    def quantize(self, whole: Path, few: Path, kind: str, importance: Path | None = None) -> None:
        """A GGUF in one of KINDS."""
        more = [importance] if importance else []
        command = [self.built("llama_quantize"), whole, few, str(KINDS[kind]), *more]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

    def quantized(self, folder: Path, output: Path, kind: str, scratch: Path, **calibration: Any) -> float:
        """A dense checkpoint `output` of the values that the model of `folder` has in `kind`; bits that a weight takes."""
        from eval.gguf_folder import read_gguf, write_gguf

        scratch.mkdir(parents=True, exist_ok=True)
        whole, few, importance = scratch / "whole.gguf", scratch / "few.gguf", scratch / "importance"
        write_gguf(folder, whole)
        write_importance(folder, importance, **calibration)
        self.quantize(whole, few, kind, importance)
        return read_gguf(few, folder, output)


@torch.no_grad()
def write_importance(folder: Path, file: Path, *, text: str, samples: int, seq_len: int, seed: int) -> None:
    """Mean squares of every input of a block's matrices, as llama_quantize.c reads them."""
    from eval.gguf_folder import renamed

    reader, device = CheckpointReader(folder), torch.device("cpu")
    model = StreamedModel(reader, device=device, dtype=torch.float32)
    windows = load_windows(
        text, load_tokenizer(folder, False), seq_len=seq_len, samples=samples, seed=seed, vocabulary=model.vocabulary
    )
    acts = model.embed(split_batches(windows.ids, None, device, model.hidden_size))
    entries: list[bytes] = []
    for block in model.blocks():
        inputs = learn_inputs(block, acts, [weight for weight in block.weights if weight.prunable])
        calibrate(block, acts, inputs, lambda _: InputNorm, device=device, seed=seed)
        for entry in inputs:
            assert isinstance(entry.statistic, InputNorm)
            values = (entry.statistic.squares / entry.statistic.tokens).float().numpy()
            for weight in entry.weights:
                name = renamed(weight.key).encode()
                entries += [struct.pack("<i", len(name)), name, struct.pack("<ii", 1, len(values)), values.tobytes()]
        block.run(acts, into=acts)
    file.write_bytes(struct.pack("<i", len(entries) // 4) + b"".join(entries))
