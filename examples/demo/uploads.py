"""Images that visitors give: opened within limits, fitted to the model, masked by what was painted."""

import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dnd_hf.data.images import ImageTransform, to_images

from .limits import Limits


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
REGIONS = ("what I paint", "right half", "bottom half", "left half", "top half")


def guard_pillow(limits: Limits) -> None:
    """Pillow refuses images of too many pixels wherever the page's own checks do not come first."""
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def open_upload(path: str | Path, limits: Limits) -> Image.Image:
    """The image of an uploaded file, decoded; its size is looked at before.

    Raises:
        ValueError: no file, too large a file, too many pixels, or not one of `FORMATS`.
    """
    if path is None:
        raise ValueError("Upload an image first.")
    megabytes = Path(path).stat().st_size / 1e6
    if megabytes > limits.max_upload_megabytes:
        raise ValueError(f"The file must have at most {limits.max_upload_megabytes} MB, got {megabytes:.1f} MB.")
    too_large = f"The image must have at most {limits.max_upload_megapixels} million pixels."
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > limits.max_pixels:
                raise ValueError(too_large)
            image.load()
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(too_large) from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"The file must be an image ({', '.join(FORMATS)}).") from error


def fitted(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, str]:
    """The image cropped in the centre and resized to `size` (height, width); and a sentence where that changed it."""
    if image.size == size[::-1]:
        note = ""
    else:
        note = f"Resized and cropped from {image.width}×{image.height} to {size[1]}×{size[0]} pixels."
    (result,) = to_images(ImageTransform(size)(image)[None])
    return result, note


def enlargement(image: Image.Image, least: int) -> int:
    """The whole number by which an image becomes at least `least` pixels wide or high."""
    return max(1, math.ceil(least / max(image.size)))


def enlarged(image: Image.Image, least: int) -> Image.Image:
    """The image with every pixel a square of [`enlargement`] pixels."""
    factor = enlargement(image, least)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def painted_mask(editor: dict | None, size: tuple[int, int]) -> Image.Image:
    """White where anything was painted in a layer of the editor, `size` (height, width).

    A pixel of the model is white where any pixel of the enlarged image above it was painted.

    Raises:
        ValueError: nothing was painted.
    """
    layers = [] if editor is None else [layer for layer in editor["layers"] if layer is not None]
    white = np.zeros(size, dtype=bool)
    for layer in layers:
        rows, columns = np.nonzero(np.asarray(layer.convert("RGBA"))[..., 3] > 0)
        white[rows * size[0] // layer.height, columns * size[1] // layer.width] = True
    if not white.any():
        raise ValueError("Paint over the part of the image that is to be filled in.")
    return Image.fromarray(white)


def region_mask(region: str, size: tuple[int, int]) -> Image.Image:
    """White in one half of an image of `size` (height, width); `region` is one of `REGIONS` but the first."""
    height, width = size
    boxes = {
        "right half": (width // 2, 0, width, height),
        "left half": (0, 0, width // 2, height),
        "bottom half": (0, height // 2, width, height),
        "top half": (0, 0, width, height // 2),
    }
    if region not in boxes:
        raise ValueError(f"The part to fill must be one of {', '.join(REGIONS)}, got {region!r}.")
    mask = Image.new("L", (width, height))
    mask.paste(255, boxes[region])
    return mask
