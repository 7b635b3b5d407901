"""Classifier-free guidance: its formula, and how its scale grows over the grid."""

import math

import torch
from torch import Tensor


GUIDANCE_SCHEDULES = ("constant", "linear", "power-cosine")


def guide(logits_RV: Tensor, scale: Tensor) -> Tensor:
    """`null + (conditional - null) * scale` of `(2 * batch, vocab_size)` logits: conditional ones, then null ones."""
    conditional, null = logits_RV.chunk(2)
    return torch.addcmul(null, conditional - null, scale)


def guidance_scales(scale: float, schedule: str, power: float, length: int) -> list[float]:
    """The guidance scale of each grid cell t of `length`, in raster order.

    Args:
        scale: g, the scale that the schedule is about.
        schedule: `"constant"`: g. `"linear"`: `1 + (g - 1) * t / length`. `"power-cosine"` (RAR, arXiv 2411.00776,
            Appendix): `1 + (g - 1) / 2 * (1 - cos(pi * (t / length) ** power))`.
        power: of the last; RAR's are 1.2 to 2.75. The greater, the later guidance sets in.
        length: number of cells.
    """
    progress = [t / length for t in range(length)]
    if schedule == "linear":
        return [1 + (scale - 1) * part for part in progress]
    if schedule == "power-cosine":
        return [1 + (scale - 1) / 2 * (1 - math.cos(math.pi * part**power)) for part in progress]
    return [scale] * length
