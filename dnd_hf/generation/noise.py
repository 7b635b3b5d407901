"""The randomness of sampling: uniform numbers from generators and seeds, and the codes that they draw."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


Seed = torch.Generator | int
"""A generator, or the seed of a new generator on the CPU."""


def checked_generators(generator: Seed | Sequence[Seed] | None, batch: int) -> torch.Generator | list | None:
    """The `generator` of a call of `generate`, with seeds as generators.

    Raises:
        ValueError: it is none, or a list of another length than `batch`.
    """
    if generator is None:
        return None
    if not isinstance(generator, (list, tuple)):
        return _generator(generator)
    if len(generator) != batch:
        raise ValueError(f"`generator` must be one, or a list of one per image ({batch}), got {len(generator)}.")
    return [_generator(one) for one in generator]


def _generator(seed: Any) -> torch.Generator:
    if isinstance(seed, torch.Generator):
        return seed
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) < 2**64:
        raise ValueError(
            "`generator` must be a torch.Generator or a seed (an integer in [0, 2**64)), or a list of one per image,"
            f" got {seed!r}."
        )
    return torch.Generator().manual_seed(int(seed))


def uniform_noise(shape: tuple[int, ...], generator: torch.Generator | list | None, device: torch.device) -> Tensor:
    """Uniform float64 numbers in [0, 1), those of each image from its own generator where there is a list."""
    if isinstance(generator, list):
        return torch.cat([uniform_noise((1, *shape[1:]), one, device) for one in generator])
    source = generator.device if generator is not None else device
    if source.type == "mps":  # no float64 there
        source = torch.device("cpu")
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=source).to(device)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Samples from softmax(logits) by inverting the cumulative distribution.

    Args:
        logits: `(batch, vocab_size)`; -inf is never drawn.
        uniform: `(batch,)` float64 in [0, 1), the only randomness.

    Returns:
        `(batch,)` int64: the first code whose cumulative probability exceeds `uniform`; `vocab_size` where there is
        none because the logits are not finite.
    """
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)
