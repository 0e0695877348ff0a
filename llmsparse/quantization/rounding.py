"""How a number becomes a whole one: to the nearest, or a little towards zero where that saves bits.

Rate-distortion optimized quantization, as video coders do it: of k = ⌊|x|⌋ and k + 1 the one is taken whose
(|x| - k)² + λ · bits(k) is smaller. With uniform steps and an entropy code the best λ at high rates is 2 ln 2 · 1/12 = 0.115
steps² a bit (the slope of 1/12 · 2^(-2R)); it widens the dead zone around 0, and no number is ever clipped.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import torch
from torch import Tensor

from llmsparse.formats.digits import LARGEST


def thresholds(x: Tensor, rate: float) -> Tensor:
    """For k = 0 … LARGEST, how much |x| must exceed k to become k + 1, (LARGEST + 1,) fp32; never below one half.

    x: weights divided by their steps, of any shape. A number's bits are those of an ideal code of the rounded ones.
    """
    if rate == 0:
        return torch.full((LARGEST + 1,), 0.5)
    rounded = x.abs().round().clamp_max(LARGEST).flatten().long()
    count = torch.bincount(rounded, minlength=LARGEST + 2).double() + 0.5
    share = count / count.sum()
    share[1:] /= 2  # of each sign
    bits = -share.log2()
    return (0.5 + rate / 2 * bits.diff().clamp(0, BITS_MORE)).float()


BITS_MORE = 4  # at most, that one number more is taken to cost: what is rare in the weights may not be with feedback


def round_by(x: Tensor, above: Tensor, most: int) -> Tensor:
    """x → whole numbers of at most `most`, in the dtype of x; `above` as of `thresholds`."""
    size = x.abs()
    whole = size.floor().clamp_max_(most)
    up = size - whole > above[whole.long()]
    return (whole + up).clamp_max_(most).copysign_(x) + 0.0
