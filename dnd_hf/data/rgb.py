"""Images of any mode to RGB: transparent ones on a background, deep grey ones scaled instead of clipped.

Pillow's own `convert("RGB")` drops the alpha channel, so that a colour appears that nobody was meant to see, and clips
levels above 255 to white.
"""

import re

import numpy as np
from PIL import Image


BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}

FULL_RANGES = {"I;16": 65535, "I": 65535, "F": 1}
"""White of deep grey modes, where 0 is black."""

OPENED_LEVELS = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies levels of 2 and 4 bits by when it opens a PNG."""


def parse_background(background: str) -> tuple[int, int, int]:
    """`white`, `black` or `#RRGGBB` as (red, green, blue) in [0, 255]. Raises ValueError for anything else."""
    if background in BACKGROUNDS:
        return BACKGROUNDS[background]
    if not isinstance(background, str) or not re.fullmatch("#[0-9a-fA-F]{6}", background):
        raise ValueError(f"`background` must be 'white', 'black' or '#RRGGBB', got {background!r}.")
    red, green, blue = bytes.fromhex(background[1:])
    return red, green, blue


def correct_transparency(image: Image.Image) -> None:
    """Corrects the transparent colour of a PNG that has just been opened, not yet loaded.

    Pillow gives levels of 2, 4 and 16 bits as 8 bits, but leaves the transparent one as it is in the file.
    """
    transparent, tile = image.info.get("transparency"), getattr(image, "tile", None)
    if transparent is None or not tile:
        return
    levels = tile[0][3]
    if levels in OPENED_LEVELS:
        image.info["transparency"] = transparent * OPENED_LEVELS[levels]
    elif levels == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in transparent)


def as_rgb(image: Image.Image, background: tuple[int, int, int] = BACKGROUNDS["white"]) -> Image.Image:
    """An image of any mode as RGB, the same size.

    Transparent images (RGBA, LA, PA, or with a transparent colour or palette) are composited on `background`. 16-bit
    grey (I;16) is scaled from [0, 65535]. 32-bit grey (I) and float (F) have no white that all agree on: an image whose
    values all lie in [0, 65535] or, float, in [0, 1] is scaled from there, any other from its own minimum and maximum.

    Raises:
        ValueError: a float image with values that are not finite, or a mode that Pillow cannot convert.
    """
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        return _composited(_from_deep_grey(image), background)
    if image.mode == "La":  # premultiplied, which Pillow converts to LA only
        image = image.convert("LA")
    return _composited(image, background)


def _composited(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """8-bit grey (L), or with an alpha channel (LA) where a level is transparent."""
    levels = np.asarray(image).astype(np.float64)
    if not np.isfinite(levels).all():
        raise ValueError("it has values that are not finite")
    low, high = 0, FULL_RANGES[image.mode[:4]]
    if levels.min() < low or levels.max() > high:
        low, high = levels.min(), levels.max()
    grey = Image.fromarray(((levels - low) / max(high - low, np.finfo(np.float64).tiny) * 255).round().astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    return grey
