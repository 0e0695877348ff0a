"""What activations of 8 bits cost: perplexity of the same quantized model by `cpu-nested` and by `cpu-nested-int8`.

`python -m eval.int8_activations DATA` quantizes the models of `eval.frontier` and writes eval/results/int8.csv. Every token goes
through the kernels, also where a run would have unpacked the weight; computed in float32, so that nothing else is rounded. `change` is
perplexity with 8 bits over that without, less 1.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmsparse
from eval.frontier import SAMPLES, WINDOWS, models
from eval.table import write
from llmsparse.inference.load import load_model
from llmsparse.inference.packed_experts import PackedStack, packed_weights
from llmsparse.models.origin import load_tokenizer
from llmsparse.text.windows import load_evaluation

RESULTS = Path(__file__).parent / "results" / "int8.csv"
BITS = (2.3, 3.0)
BATCH = 8


@torch.no_grad()
def perplexity(folder: Path, backend: str, ids: Tensor) -> float:
    """ids (windows, tokens)."""
    model: Any = load_model(folder, backend=backend, device=torch.device("cpu"), dtype="float32")
    for _, weight in packed_weights(model):
        assert not isinstance(weight, PackedStack) and weight.choice.backend == backend
        weight.choice = replace(weight.choice, tokens=None)
    total = 0.0
    for batch in ids.split(BATCH):
        logits = model(batch).logits[:, :-1].flatten(0, 1).float()
        total += torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in models(options.data, Path(scratch)):
            tokenizer = load_tokenizer(model.folder, False)
            ids = load_evaluation(model.evaluation, tokenizer, seq_len=model.seq_len, limit=WINDOWS).ids
            for bits in BITS:
                out = Path(scratch) / f"{model.name}-{bits}"
                text: dict[str, Any] = {"calibration": model.calibration, "calibration_samples": SAMPLES}
                text |= {"seq_len": model.seq_len, "device": "cpu", "dtype": "float32"}
                llmsparse.quantize(str(model.folder), output=str(out), bits=bits, **text)
                exact, int8 = (perplexity(out, backend, ids) for backend in ("cpu-nested", "cpu-nested-int8"))
                row = {"model": model.name, "bits": bits, "windows": len(ids), "seq_len": model.seq_len}
                row |= {"exact": f"{exact:.5f}", "int8": f"{int8:.5f}", "change": f"{int8 / exact - 1:+.5%}"}
                rows.append(row)
                print(row, flush=True)
    write(RESULTS, rows)


if __name__ == "__main__":
    main()
