"""What `eval.frontier` compares with: weights of b bits in groups of columns, rounded to the nearest or by GPTQ.

Asymmetric: each group of a row has a scale of 16 bits and a zero point of b bits, w ≈ s · (q - z), 0 ≤ q < 2^b, so that a
weight takes b + (16 + b) / g bits. The grid is that of the group's smallest and largest weight, or of a share of them down to
a half, whichever loses least (GPTQ's `mse` option). By GPTQ a group's grid is made of what the weights have become when its first
column is reached, and later columns absorb the error of earlier ones; 1 % damping, blocks of 128, columns from left to right.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmsparse.calibration.inputs import calibrate, learn_inputs
from llmsparse.models.origin import copy_side_files, load_tokenizer
from llmsparse.models.streamed import StreamedModel
from llmsparse.pruners.sparsegpt import factor_hessian
from llmsparse.runs.device import split_batches
from llmsparse.sparsity.stats import Gram
from llmsparse.storage.checkpoint import CheckpointReader, CheckpointWriter
from llmsparse.text.windows import load_windows

SHARES = tuple(1 - 0.05 * n for n in range(11))  # of the range of a group
NORM = 2.4  # of the error that the share is chosen by, as in the released code
BLOCK = 128
DAMP = 0.01


def bits_of(bits: int, group: int) -> float:
    """Stored, a weight."""
    return bits + (16 + bits) / group


def grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point (out,) of weights (out, group)."""
    most = 2**bits - 1
    best = torch.full_like(weight[:, 0], torch.inf)
    scale, zero = torch.ones_like(best), torch.zeros_like(best)
    for share in SHARES:
        low, high = share * weight.amin(1).clamp_max(0), share * weight.amax(1).clamp_min(0)
        s = ((high - low) / most).half().float().clamp_min(2**-24)
        z = (-low / s).round().clamp(0, most)
        error = (rounded(weight, s[:, None], z[:, None], most) - weight).abs().pow(NORM).sum(1)
        scale, zero = torch.where(error < best, s, scale), torch.where(error < best, z, zero)
        best = torch.minimum(error, best)
    return scale, zero


def rounded(weight: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
    return scale * ((weight / scale + zero).round().clamp(0, most) - zero)


def nearest(weight: Tensor, _: Gram, bits: int, group: int) -> Tensor:
    """weight (out, in) fp32, every number by itself."""
    parts = weight.reshape(-1, group)
    scale, zero = grid(parts, bits)
    return rounded(parts, scale[:, None], zero[:, None], 2**bits - 1).view_as(weight)


def gptq(weight: Tensor, stat: Gram, bits: int, group: int) -> Tensor:
    """weight (out, in) fp32, column by column."""
    m, _, _ = stat.factor("gptq", lambda: factor_hessian(stat, DAMP))
    w, most = weight.T.contiguous(), 2**bits - 1  # (in, out)
    lost, made = torch.zeros_like(w), torch.zeros_like(w)
    scale = zero = w[0]
    for a in range(0, len(w), BLOCK):
        b = min(a + BLOCK, len(w))
        now = torch.addmm(w[a:b], m[a:b, :a], lost[:a])
        for j in range(a, b):
            if j % group == 0:  # what its columns have become through all that is done
                become = torch.addmm(w[j : j + group], m[j : j + group, :j], lost[:j])
                scale, zero = grid(become.T, bits)
            column = now[j - a].addmv(lost[a:j].T, m[j, a:j])
            made[j] = rounded(column, scale, zero, most)
            lost[j] = w[j] - made[j]
    return made.T.contiguous()


METHODS: dict[str, Callable[[Tensor, Gram, int, int], Tensor]] = {"rtn": nearest, "gptq": gptq}


@torch.no_grad()
def quantize_model(
    folder: Path, output: Path, method: str, bits: int, group: int, *, text: str, samples: int, seq_len: int, seed: int
) -> None:
    """A dense checkpoint of the weights as they are after quantization, of the calibration that `llmsparse quantize` has."""
    reader, device = CheckpointReader(folder), torch.device("cpu")
    model = StreamedModel(reader, device=device, dtype=torch.float32)
    windows = load_windows(
        text, load_tokenizer(folder, False), seq_len=seq_len, samples=samples, seed=seed, vocabulary=model.vocabulary
    )
    acts = model.embed(split_batches(windows.ids, None, device, model.hidden_size))
    output.mkdir(parents=True)
    copy_side_files(folder, output)
    specs = {key: (reader.spec(key).shape, reader.spec(key).dtype) for key in reader.keys()}
    writer = CheckpointWriter(output, specs, 2**40)
    writer.copy(reader, model.outside_keys)
    for block in model.blocks():
        weights = [weight for weight in block.weights if weight.prunable]
        inputs = learn_inputs(block, acts, weights)
        calibrate(block, acts, inputs, lambda _: Gram, device=device, seed=seed)
        for entry in inputs:
            assert isinstance(entry.statistic, Gram)
            for weight in entry.weights:
                block.store(weight, METHODS[method](block.view(weight).float(), entry.statistic, bits, group))
        block.reload()
        block.run(acts, into=acts)
        writer.write(dict(block.stored))
    writer.finish()
