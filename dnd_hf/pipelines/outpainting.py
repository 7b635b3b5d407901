"""Images larger than the model's own: which sizes there are, and where a user's image stands in them."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.utils import logging
from torch import Tensor
from transformers import PreTrainedModel

from ..ops.number_checks import whole_number
from ..ops.overlapping_windows import window_corners
from .user_images import image_tensor, size_of_images


@dataclass(frozen=True)
class Canvas:
    """What is made, of the model's size or larger.

    Args:
        grid_size: (height, width) in cells.
        code_stride: pixels of a cell, (rows, columns).
        overlap: of the windows, see [`OutpaintingMixin.outpaint`].
        larger: whether it is larger than the transformer's grid.
    """

    grid_size: tuple[int, int]
    code_stride: tuple[int, int]
    overlap: int | tuple[int, int] | None
    larger: bool

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        (rows, columns), (row_stride, column_stride) = self.grid_size, self.code_stride
        return rows * row_stride, columns * column_stride


def checked_canvas(
    transformer: PreTrainedModel,
    vqvae: ModelMixin | None,
    height: int | None,
    width: int | None,
    overlap: int | tuple[int, int] | None,
) -> Canvas:
    """The canvas of a call.

    Args:
        height, width: in pixels; `None`: those of the transformer's grid.
        overlap: in cells.

    Raises:
        ValueError: a size that is smaller than the model's or not a multiple of a cell; an overlap outside of its
            range; a size in pixels, where there are none.
    """
    native = tuple(transformer.config.grid_size)
    if vqvae is None:
        if height is not None or width is not None:
            raise ValueError("`height` and `width` are in pixels: they need a pipeline with a `vqvae`.")
        return Canvas(native, (1, 1), overlap, larger=False)
    cells = []
    for name, value, least, stride in zip(("height", "width"), (height, width), native, vqvae.code_stride):
        value = least * stride if value is None else whole_number(name, value)
        if value % stride or value < least * stride:
            raise ValueError(f"`{name}` must be a multiple of {stride} and at least {least * stride}, got {value}.")
        cells.append(value // stride)
    canvas = Canvas((cells[0], cells[1]), tuple(vqvae.code_stride), overlap, larger=tuple(cells) != native)
    window_corners(canvas.grid_size, native, overlap)
    return canvas


def say_that_it_is_larger(canvas: Canvas, native: tuple[int, int]) -> None:
    """Logs a warning that an image is made in windows of the model's grid `native`, (height, width) in cells."""
    windows = len(window_corners(canvas.grid_size, native, canvas.overlap))
    own = " x ".join(str(cells * stride) for cells, stride in zip(native, canvas.code_stride))
    logging.get_logger(__name__).warning(
        f"{canvas.size[0]} x {canvas.size[1]} pixels are more than the model's {own}: the image is made in {windows}"
        " windows that overlap. A window does not see what is outside of it."
    )


def placed_on(canvas: Canvas, image: Any) -> tuple[Tensor, Tensor]:
    """Images at the top left of the canvas: their pixels `(n, 3, H, W)` in [-1, 1], 0 elsewhere, and a mask.

    Args:
        image: of any size that the canvas has; see [`image_tensor`] for the types.

    Returns:
        The pixels, and `(n, 1, H, W)` booleans, True where the image has none.

    Raises:
        ValueError: no images, of different sizes, larger than the canvas, or all of it.
    """
    height, width = size_of_images(image, "image")
    if height > canvas.size[0] or width > canvas.size[1] or (height, width) == canvas.size:
        raise ValueError(
            f"`image` without a `mask_image` must be smaller than what is made, {canvas.size[0]} x {canvas.size[1]}"
            f" pixels (`height` and `width`), got {height} x {width}."
        )
    pixels = image_tensor(image, (height, width), "image")
    around = (0, canvas.size[1] - width, 0, canvas.size[0] - height)
    mask = F.pad(torch.zeros(len(pixels), 1, height, width, dtype=torch.bool), around, value=True)
    return F.pad(pixels, around), mask
