"""Images and masks as users give them, checked, as tensors."""

from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor


IMAGE_TYPES = (Image.Image, np.ndarray, Tensor)


def image_tensor(images: Any, size: tuple[int, int], name: str = "images") -> Tensor:
    """`(n, 3, H, W)` float32 in [-1, 1], of images as diffusers' `VaeImageProcessor` takes them.

    Args:
        images: PIL images (they become RGB), arrays `(H, W, 3)` or `(n, H, W, 3)` in [0, 1], tensors `(3, H, W)` or
            `(n, 3, H, W)` in [0, 1] (in [-1, 1] where there are negative values); one, or a list of one type.
        size: (height, width) that they must have; nothing is resized.
        name: of the argument, in the errors.

    Raises:
        ValueError: other types, another size, or values out of their range.
    """
    given = _listed(images, size, name)
    height, width = size
    for one in given:
        shape = one.shape[-3:] if isinstance(one, Tensor) else np.shape(one)[-3:]
        expected = (3, height, width) if isinstance(one, Tensor) else (height, width, 3)
        if not isinstance(one, Image.Image) and tuple(shape) != expected:
            raise ValueError(f"`{name}` must have shape {expected}, one or a batch, got {tuple(one.shape)}.")
    tensor = VaeImageProcessor(do_resize=False, do_convert_rgb=True).preprocess(given).float()
    low, high = (value.item() for value in tensor.aminmax())
    if not (low >= -1 and high <= 1):  # also where one is not a number
        raise ValueError(f"`{name}` must have values in [0, 1], or tensors in [-1, 1].")
    return tensor


def mask_tensor(mask_image: Any, size: tuple[int, int]) -> Tensor:
    """`(n, 1, H, W)` booleans, True where an image is to be filled: white, values from 0.5 on.

    Args:
        mask_image: PIL images (they become grey), arrays or tensors `(H, W)`, `(1, H, W)` or `(n, 1, H, W)` in [0, 1]
            or booleans; one, or a list of one type.
        size: (height, width) that they must have; nothing is resized.

    Raises:
        ValueError: other types, another size, values out of their range; or nothing, or all of a mask is white.
    """
    given = _listed(mask_image, size, "mask_image")
    if isinstance(given[0], Image.Image):
        given = [np.asarray(one.convert("L"), dtype=np.float32) / 255 for one in given]
    tensors = [torch.as_tensor(one).float() for one in given]
    for one in tensors:
        if tuple(one.shape[-2:]) != size or one.ndim > 4 or any(n != 1 for n in one.shape[-3:-2]):
            raise ValueError(
                f"`mask_image` must have shape {size}, {(1, *size)} or {('n', 1, *size)}, got {tuple(one.shape)}."
            )
    mask = torch.cat([one.reshape(-1, 1, *size) for one in tensors])
    if not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError("`mask_image` must have values in [0, 1].")
    mask = mask >= 0.5
    share = mask.float().mean((1, 2, 3))
    if ((share == 0) | (share == 1)).any():
        raise ValueError("`mask_image` must be white where the image is to be filled and black where it stays: both.")
    return mask


def size_of_images(images: Any, name: str) -> tuple[int, int]:
    """(height, width) of images of the types of [`image_tensor`], of the first where there are several.

    Raises:
        ValueError: other types, or no image.
    """
    first = _typed(images, name)[0]
    if isinstance(first, Image.Image):
        return first.height, first.width
    if first.ndim < 3:
        raise ValueError(
            f"`{name}` must have shape (3, height, width) or (height, width, 3), got {tuple(first.shape)}."
        )
    height, width = first.shape[-2:] if isinstance(first, Tensor) else first.shape[-3:-1]
    return height, width


def encoded(vqvae: ModelMixin, pixels: Tensor, device: torch.device, batch_size: int = 64, **options) -> Tensor:
    """Codes of pixels `(n, 3, H, W)` in [-1, 1], on a device; `options` are those of [`RQVAE.encode`]."""
    parts = pixels.to(device, vqvae.dtype).split(batch_size)
    return torch.cat([vqvae.encode(part, **options).codes for part in parts])


def _listed(images: Any, size: tuple[int, int], name: str) -> list:
    """One or several of a known type as a list; PIL images have the size."""
    given = _typed(images, name)
    for one in given:
        if isinstance(one, Image.Image) and one.size != size[::-1]:
            raise ValueError(
                f"`{name}` must be {size[0]} pixels high and {size[1]} wide, got {one.height} and {one.width}."
            )
    return given


def _typed(images: Any, name: str) -> list:
    """One or several of a known type as a list."""
    given = list(images) if isinstance(images, (list, tuple)) else [images]
    if not given or not any(all(isinstance(one, kind) for one in given) for kind in IMAGE_TYPES):
        types = ", ".join(sorted({type(one).__name__ for one in given}))
        raise ValueError(f"`{name}` must be PIL images, arrays or tensors, one or a list of one type, got [{types}].")
    return given
