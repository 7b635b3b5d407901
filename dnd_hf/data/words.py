"""Rendered words: small pictures of one English word each, made on the fly, for class-conditional models of text.

The smallest member of the rich-text family: the label is the word, the picture varies in face, size, place, colours
and tilt, and an OCR engine can tell whether a generated picture says what it was asked to say
(`dnd_hf.evaluation.words`). Nothing is downloaded: the faces are those that matplotlib ships.
"""

from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset


_WORD_LIST = """
    animal answer apple autumn baby bread bridge brother butter camera candle carpet castle chair cheese
    circle coffee corner cup dance desert dinner doctor dragon dream earth engine family farmer father finger
    five flower forest ghost giraffe grape green guitar happy harbor heart history honey house island jacket
    jungle kitchen knife ladder lemon market memory mirror monkey morning mountain music nature number ocean
    orange pencil people picture planet pocket potato princess purple queen rabbit river salad school shadow
    silver six spider spring square story sugar summer sun table teacher thunder ticket tomato travel umbrella
    valley violin water weather window yellow zebra
"""
WORDS = tuple(_WORD_LIST.split())
"""The 100 classes: common lower-case English words of 3 to 8 letters, in alphabetical order; the label is the index."""

FONT_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
)
"""File names, without `.ttf`, of the faces in matplotlib's `fonts/ttf` that words are drawn in."""

MIN_CONTRAST = 110
"""Least difference between the luma of text and background, on the 0..255 scale of Rec. 601 (Pillow's mode "L")."""

MAX_TILT = 3.0
"""Largest rotation of a word, in degrees, to either side."""

MARGIN = 2
"""Pixels along each edge of a picture that the text never touches."""

_LUMA = np.array([0.299, 0.587, 0.114])
_X_HEIGHT_SHARE = (0.34, 0.44)  # of the picture's height: 11 to 14 px of 32, what survives 8x8-pixel patches
_DRAWN_X_HEIGHT = 20  # words are drawn larger than they are shown, so that tilting them leaves no jagged edges
_MIN_HEIGHT, _MIN_WIDTH = 16, 64


@cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    """`face` at the size that makes its letter "x" about `_DRAWN_X_HEIGHT` pixels high, the same for every face."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('rendering words needs the fonts of matplotlib: pip install "dnd-hf[text]"') from error
    path = str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf"))
    _, top, _, bottom = ImageFont.truetype(path, 100).getbbox("x")
    return ImageFont.truetype(path, round(100 * _DRAWN_X_HEIGHT / (bottom - top)))


@lru_cache(maxsize=len(FONT_FACES) * len(WORDS))
def _drawn(word: str, face: str) -> Image.Image:
    """`word` in `face`, upright, large, as a mask (mode "L", 255 is ink) cut to its ink."""
    font = _font(face)
    left, top, right, bottom = font.getbbox(word)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), word, fill=255, font=font)
    return mask


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Text and background: uniform RGB, drawn again until their lumas differ by `MIN_CONTRAST`, either being darker."""
    while True:
        text, background = rng.integers(0, 256, (2, 3))
        if abs((text - background) @ _LUMA) >= MIN_CONTRAST:
            return tuple(text.tolist()), tuple(background.tolist())


def _check_size(height: int, width: int) -> None:
    if height < _MIN_HEIGHT:
        raise ValueError(f"height is {height}; it must be at least {_MIN_HEIGHT} pixels")
    if width < _MIN_WIDTH:
        raise ValueError(f"width is {width}; it must be at least {_MIN_WIDTH} pixels")


def render_word(word: str, rng: np.random.Generator, height: int = 32, width: int = 128) -> Image.Image:
    """Draws one word in a random face, size, place, tilt and pair of colours, on a uniform background.

    The face is uniform over `FONT_FACES`; the tilt uniform within `MAX_TILT` degrees; the x-height uniform from 34 % to
    44 % of the picture's height (11 to 14 px of 32), as far as the tilted word fits; the place uniform over the room
    left inside `MARGIN`; the colours uniform RGB whose lumas differ by at least `MIN_CONTRAST`.

    Args:
        word: at least one visible character.
        rng: the only source of randomness.
        height, width: size of the picture in pixels, at least 16 and 64.

    Returns:
        RGB picture of `width` x `height` pixels, the whole word inside it.

    Raises:
        ValueError: `word` is blank, or `height` or `width` too small.
        ImportError: matplotlib, whose fonts are used, is not installed.
    """
    if not word.strip():
        raise ValueError(f"word is {word!r}; it must have at least one visible character")
    _check_size(height, width)
    mask = _drawn(word, FONT_FACES[rng.integers(len(FONT_FACES))])
    mask = mask.rotate(rng.uniform(-MAX_TILT, MAX_TILT), Image.Resampling.BICUBIC, expand=True)
    mask = mask.crop(mask.getbbox())

    room_x, room_y = width - 2 * MARGIN, height - 2 * MARGIN
    fit = min(room_x / mask.width, room_y / mask.height)
    low, high = (min(fit, share * height / _DRAWN_X_HEIGHT) for share in _X_HEIGHT_SHARE)
    scale = rng.uniform(low, high)
    mask = mask.resize((max(1, int(mask.width * scale)), max(1, int(mask.height * scale))), Image.Resampling.BICUBIC)

    text, background = _colours(rng)
    place = (
        MARGIN + int(rng.integers(room_x - mask.width + 1)),
        MARGIN + int(rng.integers(room_y - mask.height + 1)),
    )
    picture = Image.new("RGB", (width, height), background)
    picture.paste(text, place, mask)
    return picture


class WordImages(Dataset):
    """Pictures of the 100 `WORDS`, rendered when asked for; picture i depends on `(seed, i)` alone.

    Args:
        num_images: length, at least 1. Labels go round (`i % 100`), so a multiple of 100 has classes of equal size.
        seed: non-negative. Two seeds give independent streams of pictures.
        height, width: size of the pictures in pixels, at least 16 and 64.

    Items are `{"image": PIL.Image.Image, "label": int}`: an RGB picture of `width` x `height` and a label in
    [0, 100), the index of its word in `class_names`. A negative index counts from the end.

    Raises:
        ValueError: an argument outside its range.
        IndexError: an index outside [-num_images, num_images).
    """

    class_names = WORDS

    def __init__(self, num_images: int, seed: int = 0, height: int = 32, width: int = 128):
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; it must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be at least 0")
        _check_size(height, width)
        self.num_images = num_images
        self.seed = seed
        self.height = height
        self.width = width

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict:
        if not -self.num_images <= index < self.num_images:
            raise IndexError(f"index is {index}; it must be in [{-self.num_images}, {self.num_images})")
        index %= self.num_images
        label = int(index % len(WORDS))
        rng = np.random.default_rng((self.seed, index))
        return {"image": render_word(WORDS[label], rng, self.height, self.width), "label": label}
