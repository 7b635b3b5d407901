"""Codes that are given to `generate` and stay, while the others are sampled: their checks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.tensor_checks import check_integers


@dataclass(frozen=True)
class GivenCodes:
    """Given codes of a batch of grids.

    Args:
        codes_BLD: int64, 0 where none is given.
        mask_BLD: bool, True where one is given.
        whole_L: for each cell, whether all its codes are given in all images: there is nothing to sample.
    """

    codes_BLD: Tensor
    mask_BLD: Tensor
    whole_L: tuple[bool, ...]


def checked_given_codes(
    codes: Tensor | Sequence | None,
    codes_mask: Tensor | Sequence | None,
    shape: tuple[int, ...],
    vocab_size: int,
    device: torch.device,
) -> GivenCodes | None:
    """The `codes` and `codes_mask` of a call of `generate`, on the device of the sampling; None where none are given.

    Args:
        codes: integers, in `[0, vocab_size)` where the mask is True; elsewhere they are not read.
        codes_mask: booleans.
        shape: of both, `(batch, height, width, depth)`.

    Raises:
        ValueError: only one of the two; another shape or type; a given code out of its range.
    """
    if codes is None and codes_mask is None:
        return None
    if codes is None or codes_mask is None:
        raise ValueError("`codes` and `codes_mask` must be given together; where the mask is True, the code stays.")
    codes, codes_mask = torch.as_tensor(codes), torch.as_tensor(codes_mask)
    for name, value in (("codes", codes), ("codes_mask", codes_mask)):
        if tuple(value.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(value.shape)}.")
    if codes_mask.dtype != torch.bool:
        raise ValueError(f"`codes_mask` must be booleans, got {codes_mask.dtype}.")
    codes_mask = codes_mask.to(codes.device)
    check_integers("codes", codes[codes_mask], vocab_size, wait=True)
    whole_L = codes_mask.all(-1).all(0).flatten().tolist()
    given = codes.long().masked_fill(~codes_mask, 0).flatten(1, 2).to(device)
    return GivenCodes(given, codes_mask.flatten(1, 2).to(device), tuple(whole_L))
