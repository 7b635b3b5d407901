"""Best of N: of several candidates for an image, the one that ranks highest."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.number_checks import whole_number


RANKS = ("likelihood", "guidance")
Rank = str | Callable[[list, list], Sequence[float]]
"""One of `RANKS`, or a function of PIL images and their labels (or prompts) that gives each image a number."""


def check_candidates(num_candidates: int, rank_by: Rank | None, transformer: Any, can_decode: bool) -> Rank:
    """How candidates are ranked.

    Raises:
        ValueError: `num_candidates` below 1; an unknown `rank_by`; `"guidance"` for a model without a null class; a
            function where there are no images.
    """
    whole_number("num_candidates", num_candidates)
    if rank_by is None:
        return "likelihood"
    if callable(rank_by):
        if not can_decode:
            raise ValueError(f"`rank_by` must be one of {RANKS} for a pipeline without a `vqvae`: it makes no images.")
    elif rank_by not in RANKS:
        raise ValueError(f"`rank_by` must be one of {RANKS} or a function, got {rank_by!r}.")
    elif rank_by == "guidance" and not transformer.config.has_null_class:
        raise ValueError('`rank_by` must not be "guidance" for a model without a null class (`class_dropout_prob` 0).')
    return rank_by


def best_of(
    codes: Tensor,
    num_candidates: int,
    rank_by: Rank,
    transformer: Any,
    conditions: Tensor,
    overlap: int | tuple[int, int] | None,
    labels: Sequence,
    decode: Callable[[Tensor], list],
) -> Tensor:
    """Of the codes of all candidates those of the best, one for each image.

    Args:
        codes: `(num_candidates * images, height, width, depth)`, all images of the first candidate, then those of the
            second, and so on.
        conditions: of these codes.
        overlap: of the windows of images that are larger than the transformer's grid.
        labels: of the images, or of several side by side, for a function.
        decode: makes PIL images of codes, for a function.
    """
    if callable(rank_by):
        images = len(codes) // num_candidates
        of_images = [labels[i // (images // len(labels))] for i in range(images)]
        scores = checked_scores(rank_by(decode(codes), of_images * num_candidates), len(codes), codes.device)
    else:
        scores = candidate_scores(rank_by, transformer, conditions, codes, overlap)
    return codes[best_candidates(scores, num_candidates)]


def candidate_scores(
    rank_by: str,
    transformer: Any,
    conditions: Tensor,
    codes: Tensor,
    overlap: int | tuple[int, int] | None = None,
) -> Tensor:
    """`(n,)`: the log-probability of codes under their conditions, with `"guidance"` less that under none."""
    scores = transformer.outpaint_log_probs(conditions, codes, overlap).sum((1, 2, 3))
    if rank_by == "guidance":
        scores = scores - transformer.outpaint_log_probs(None, codes, overlap).sum((1, 2, 3))
    return scores


def checked_scores(scores: Any, count: int, device: torch.device) -> Tensor:
    """What a `rank_by` function returned, as `(count,)`.

    Raises:
        ValueError: it is not as many numbers as there are candidates, or one is not a number.
    """
    scores = torch.as_tensor(scores, dtype=torch.float64).to(device)
    if tuple(scores.shape) != (count,) or scores.isnan().any():
        raise ValueError(f"`rank_by` must return a number for each of {count} images, got {scores.tolist()!r:.80}.")
    return scores


def best_candidates(scores: Tensor, num_candidates: int) -> Tensor:
    """`(images,)` indices of the best candidate of each image, of equal ones the first.

    Args:
        scores: `(num_candidates * images,)`, all images of the first candidate, then those of the second, and so on.
    """
    best = scores.view(num_candidates, -1)
    images = best.shape[1]
    first = (best == best.amax(0)).int().argmax(0)
    return first * images + torch.arange(images, device=scores.device)
