"""Filling in a part of an image: which cells are sampled anew, what the encoder sees, and whose pixels are shown."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.number_checks import whole_number
from .user_images import mask_tensor


@dataclass(frozen=True)
class Hole:
    """What is to be filled in images.

    Args:
        pixels: `(n, 3, H, W)` in [-1, 1].
        mask: `(n, 1, H, W)` booleans, True where the pixels are to be made.
        cells: `(n, height, width)` booleans, True where the codes are.
        feather: see [`composited`].
    """

    pixels: Tensor
    mask: Tensor
    cells: Tensor
    feather: int

    @property
    def visible(self) -> Tensor:
        """The pixels as the encoder gets them, see [`without_hole`]."""
        return without_hole(self.pixels, self.mask)

    def codes_mask(self, depth: int) -> Tensor:
        """`(n, height, width, depth)` booleans, True where a code is kept."""
        return (~self.cells)[..., None].expand(*self.cells.shape, depth)

    def composited(self, sample: Tensor) -> Tensor:
        """The user's pixels around those of the model `(k * n, 3, H, W)`, k times all images."""
        times = len(sample) // len(self.pixels)
        pixels, mask = (part.to(sample.device).repeat(times, 1, 1, 1) for part in (self.pixels, self.mask))
        return composited(sample, pixels, mask, self.feather)


def check_inpainting(image: Any, mask_image: Any, mask_ring: int, feather: int, num_particles: int) -> None:
    """Raises ValueError for an image without a mask, or the reverse, and for numbers below their least."""
    if (image is None) != (mask_image is None):
        raise ValueError("`image` and `mask_image` must be given together; what is white is filled in.")
    whole_number("mask_ring", mask_ring, minimum=0)
    whole_number("feather", feather, minimum=0)
    if whole_number("num_particles", num_particles) > 1 and image is None:
        raise ValueError("`num_particles` above 1 needs an `image` and a `mask_image`.")


def hole_in(
    pixels: Tensor,
    mask_image: Any,
    code_stride: tuple[int, int],
    mask_ring: int,
    feather: int,
    num_labels: int,
    num_images_per_label: int,
) -> Hole:
    """The hole of each image of a call; images and masks are one for all labels, or one for each.

    Raises:
        ValueError: another number of them, a mask that does not fit, or no cell left to be kept.
    """
    mask = mask_tensor(mask_image, (pixels.shape[2], pixels.shape[3]))
    for name, given in (("image", pixels), ("mask_image", mask)):
        if len(given) not in (1, num_labels):
            raise ValueError(f"`{name}` must be one, or one for each of {num_labels} labels, got {len(given)}.")
    cells = hole_of_cells(mask, code_stride, mask_ring)

    def for_each_image(part: Tensor) -> Tensor:
        return part.expand(num_labels, *part.shape[1:]).repeat_interleave(num_images_per_label, dim=0)

    return Hole(for_each_image(pixels), for_each_image(mask), for_each_image(cells), feather)


def hole_of_cells(mask: Tensor, code_stride: tuple[int, int], ring: int) -> Tensor:
    """The cells `(n, height, width)` that are sampled: those with a masked pixel, and `ring` cells around them.

    Args:
        mask: `(n, 1, H, W)` booleans, True where the image is to be filled.
        code_stride: pixels of a cell, (rows, columns).

    Raises:
        ValueError: no cell is left to be kept.
    """
    cells = F.max_pool2d(mask.float(), code_stride)
    cells = grown(cells, ring).squeeze(1) > 0
    if cells.flatten(1).all(1).any():
        raise ValueError("`mask_image` must leave a cell of the grid to be kept: use a smaller one, or `mask_ring=0`.")
    return cells


def grown(mask: Tensor, distance: int) -> Tensor:
    """A mask `(n, 1, H, W)` of numbers, grown by so many pixels or cells in all directions."""
    return F.max_pool2d(mask, 2 * distance + 1, stride=1, padding=distance) if distance else mask


def without_hole(pixels: Tensor, mask: Tensor) -> Tensor:
    """Images whose masked pixels have the mean colour of the others: what was there reaches no code.

    The encoder's group norms read the whole image, so a black or white hole would change the codes far from it.
    """
    kept = (~mask).to(pixels.dtype)
    mean = (pixels * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True)
    return torch.where(mask, mean, pixels)


def composited(sample: Tensor, pixels: Tensor, mask: Tensor, feather: int) -> Tensor:
    """The user's pixels, and the model's where the mask is True.

    Args:
        sample, pixels: of the model and of the user, `(n, 3, H, W)`.
        mask: `(n, 1, H, W)` booleans.
        feather: so many pixels around the mask are blended from the one to the other, linearly.
    """
    mask = mask.to(sample.dtype)
    weight = sum(grown(mask, distance) for distance in range(feather + 1)) / (feather + 1)
    return pixels.to(sample) + weight * (sample - pixels.to(sample))
