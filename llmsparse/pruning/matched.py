"""A pruned block is matched: what survived moves, or what survives is decided on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from llmsparse.calibration.fading import Fading, FadingWeight
from llmsparse.calibration.matching import Match, autocast_dtype, match
from llmsparse.calibration.matching_loss import Loss
from llmsparse.models.streamed import Activations, Block
from llmsparse.pruning.options import PruneOptions
from llmsparse.pruning.selection import Choice
from llmsparse.runs.progress import Progress
from llmsparse.sparsity.patterns import KeepingZeros


def match_block(
    block: Block,
    acts: Activations,
    loss: Loss,
    choices: Mapping[str, Choice],
    keep: Mapping[str, Tensor],
    fading: Fading | None,
    options: PruneOptions,
    progress: Progress,
) -> Match:
    """Tune the weights of `choices` so that the loss of the block's output falls; updates `block.stored`.

    `keep`: weight name → mask (out, in) that its method made.
    """
    block.reload()
    free = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in block.stored.items()}
    for choice in choices.values():
        block.view(choice.weight, free).copy_(keep[choice.weight.name])
    matched = match(
        block,
        acts,
        loss,
        {name: mask for name, mask in block.in_module(free).items() if mask.any()},
        steps=options.match_steps,
        seed=options.seed,
        autocast=autocast_dtype(options.dtype, options.device),
        fading=fading,
        advance=progress.batches(f"matching {block.name}", options.match_steps),
    )
    if matched.record.improved:
        values, kept = block.on_disk(matched.values), block.on_disk(matched.keep)
        with acts.share.ranks.together():
            for choice in choices.values():
                block.store(choice.weight, block.view(choice.weight, values) * block.view(choice.weight, kept))
    return matched.record


def fading_of(
    choices: Iterable[Choice],
    norms: Mapping[str, Tensor],
    zeros: Mapping[str, Tensor],
    beginning: Mapping[str, Tensor],
) -> Fading:
    """What fades: weight name → norms of its inputs, and where it is to stay 0; `beginning`: on-disk key → tensor."""
    weights = [
        FadingWeight(
            choice.weight,
            KeepingZeros(choice.pattern, zeros[choice.weight.name]) if choice.weight.name in zeros else choice.pattern,
            norms[choice.weight.name],
        )
        for choice in choices
    ]
    return Fading(weights, beginning)
