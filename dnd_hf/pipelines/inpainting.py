"""Filling in a part of an image: which cells are sampled anew, what the encoder sees, and whose pixels are shown."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.number_checks import whole_number
from .outpainting import Canvas, placed_on
from .user_images import image_tensor, mask_tensor


Box = tuple[int, int, int, int]
"""(top, bottom, left, right) in cells, the second and the last excluded."""


@dataclass(frozen=True)
class Hole:
    """What is to be filled in images.

    Args:
        pixels: `(n, 3, H, W)` in [-1, 1].
        mask: `(n, 1, H, W)` booleans, True where the pixels are to be made.
        cells: `(n, height, width)` booleans, True where the codes are.
        code_stride: pixels of a cell, (rows, columns).
        feather: see [`composited`].
    """

    pixels: Tensor
    mask: Tensor
    cells: Tensor
    code_stride: tuple[int, int]
    feather: int

    def codes_mask(self, depth: int) -> Tensor:
        """`(n, height, width, depth)` booleans, True where a code is kept."""
        return (~self.cells)[..., None].expand(*self.cells.shape, depth)

    def encoded(self, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Codes `(n, height, width, depth)`, those of the image where they are kept; elsewhere they mean nothing.

        Args:
            encode: makes codes of pixels `(m, 3, h, w)`. It gets the part of each image that [`known_box`] says.
        """
        boxes = [known_box(mask, self.code_stride) for mask in self.mask]
        parts: dict[int, Tensor] = {}
        for box in dict.fromkeys(boxes):
            images = [i for i, one in enumerate(boxes) if one == box]
            parts |= zip(images, self._encoded_box(images, box, encode))
        return torch.stack([parts[i] for i in range(len(boxes))])

    def _encoded_box(self, images: list[int], box: Box, encode: Callable[[Tensor], Tensor]) -> Tensor:
        top, bottom, left, right = box
        (height, width), (row_stride, column_stride) = self.cells.shape[1:], self.code_stride
        rows, columns = slice(top * row_stride, bottom * row_stride), slice(left * column_stride, right * column_stride)
        pixels = without_hole(self.pixels[images, :, rows, columns], self.mask[images, :, rows, columns])
        above, below, before, behind = (int(cut) for cut in (top > 0, bottom < height, left > 0, right < width))
        padding = (before * column_stride, behind * column_stride, above * row_stride, below * row_stride)
        codes = encode(F.pad(pixels, padding, mode="replicate"))
        codes = codes[:, above : above + bottom - top, before : before + right - left]
        return F.pad(codes, (0, 0, left, width - right, top, height - bottom))

    def composited(self, sample: Tensor) -> Tensor:
        """The user's pixels around those of the model `(k * n, 3, H, W)`, k times all images."""
        times = len(sample) // len(self.pixels)
        pixels, mask = (part.to(sample.device).repeat(times, 1, 1, 1) for part in (self.pixels, self.mask))
        return composited(sample, pixels, mask, self.feather)


def check_inpainting(
    image: Any, mask_image: Any, mask_ring: int, feather: int, num_particles: int, larger: bool, has_vqvae: bool
) -> None:
    """Raises ValueError for a mask without an image, for numbers below their least, and for useless particles.

    Args:
        larger: whether what is made is larger than the transformer's grid.
        has_vqvae: whether images can be encoded.
    """
    if image is not None and not has_vqvae:
        raise ValueError("`image` needs a pipeline with a `vqvae`.")
    if image is None and mask_image is not None:
        raise ValueError("`mask_image` needs an `image`; what is white is filled in.")
    whole_number("mask_ring", mask_ring, minimum=0)
    whole_number("feather", feather, minimum=0)
    if whole_number("num_particles", num_particles) > 1 and image is None and not larger:
        raise ValueError("`num_particles` above 1 needs an `image`, or a `height` or `width` beyond the model's own.")


def hole_in(
    image: Any,
    mask_image: Any,
    canvas: Canvas,
    mask_ring: int,
    feather: int,
    num_labels: int,
    num_images_per_label: int,
) -> Hole:
    """The hole of each image of a call; images and masks are one for all labels, or one for each.

    Args:
        mask_image: `None`: the images are smaller than the canvas, and what is beside and below them is the hole.

    Raises:
        ValueError: another number of them, a size that does not fit, or no cell left to be kept.
    """
    if mask_image is None:
        pixels, mask = placed_on(canvas, image)
    else:
        pixels, mask = image_tensor(image, canvas.size, "image"), mask_tensor(mask_image, canvas.size)
    for name, given in (("image", pixels), ("mask_image", mask)):
        if len(given) not in (1, num_labels):
            raise ValueError(f"`{name}` must be one, or one for each of {num_labels} labels, got {len(given)}.")
    cells = hole_of_cells(mask, canvas.code_stride, mask_ring)

    def for_each_image(part: Tensor) -> Tensor:
        return part.expand(num_labels, *part.shape[1:]).repeat_interleave(num_images_per_label, dim=0)

    return Hole(for_each_image(pixels), for_each_image(mask), for_each_image(cells), canvas.code_stride, feather)


def known_box(mask: Tensor, code_stride: tuple[int, int]) -> Box:
    """The part of an image that the encoder gets: the smallest box around all cells without a masked pixel.

    Its sides within the image are continued for one cell by the pixels at the side. So the encoder, whose group norms
    read all that it gets, sees no more of the hole than what the box has of it.

    Args:
        mask: `(1, H, W)` booleans, True where there are no pixels.
    """
    known = F.max_pool2d(mask.float(), code_stride)[0] == 0
    rows, columns = (known.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


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
        raise ValueError("`image` must have a cell that is kept: use a smaller `mask_image`, or `mask_ring=0`.")
    return cells


def grown(mask: Tensor, distance: int) -> Tensor:
    """A mask `(n, 1, H, W)` of numbers, grown by so many pixels or cells in all directions."""
    return F.max_pool2d(mask, 2 * distance + 1, stride=1, padding=distance) if distance else mask


def without_hole(pixels: Tensor, mask: Tensor) -> Tensor:
    """Images whose masked pixels have the mean colour of the others: what was there reaches no code.

    A black or white hole would change the encoder's group norms, and so the codes far from it, by more.
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
