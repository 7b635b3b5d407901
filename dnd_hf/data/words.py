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
    ALARM ANGEL APPLE ARROW BAKER BEACH BIRD BOOK BREAD BRUSH CAKE CANDY CHAIR CLOUD COAST COIN CROWN DANCE DEER
    DREAM DUCK DUST EAGLE EARTH FARM FEAST FIELD FISH FLAME FLUTE FORK FROST FRUIT GATE GHOST GIANT GLASS GRAPE
    GRASS GUEST HAND HEART HOME HONEY HORSE HOTEL HOUSE JUDGE JUICE KING KITE KNIFE LAKE LEAF LEMON LIGHT LUNCH
    MAPLE METAL MOON MOUSE MUSIC NIGHT NORTH NURSE OCEAN ONION PAPER PEACH PEARL PIANO PILOT PLANE PLANT QUEEN QUILT
    RADIO RAIN RIVER ROBOT ROSE SALT SHEEP SHIP SILK SNAKE SNOW SPOON STAR STONE SUGAR TABLE TIGER TRAIN TREE
    VOICE WATER WHALE WOLF ZEBRA
"""
WORDS = tuple(_WORD_LIST.split())
"""The 100 classes: English words of 4 or 5 letters in capitals, in alphabetical order; the label is the index."""

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

INKS = ("#16264d", "#7a1622", "#0f5132", "#3b1f5b")
"""Colours of the text, all dark: navy, crimson, forest green, violet."""

PAPERS = ("#fdf6e3", "#cfe8fc", "#fbd3d8", "#d9f2c4")
"""Colours of the background, all light: cream, sky, rose, lime."""

CAP_HEIGHTS = (0.56, 0.70)
"""Heights of the capitals, as shares of the picture's height: 18 and 22 px of 32, as far as the word fits."""

TILTS = (-2.0, 0.0, 2.0)
"""Rotations of a word, in degrees."""

STEPS = (4, 8)
"""Words are placed at multiples of so many pixels, down and across, from the margin."""

MARGIN = 2
"""Pixels along each edge of a picture that the text never touches."""

_DRAWN_CAP_HEIGHT = 36  # words are drawn larger than they are shown, so that tilting them leaves no jagged edges
_MIN_HEIGHT, _MIN_WIDTH = 16, 64


@cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    """`face` at the size that makes its letter "H" about `_DRAWN_CAP_HEIGHT` pixels high, the same for every face."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('rendering words needs the fonts of matplotlib: pip install "dnd-hf[text]"') from error
    path = str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf"))
    _, top, _, bottom = ImageFont.truetype(path, 100).getbbox("H")
    return ImageFont.truetype(path, round(100 * _DRAWN_CAP_HEIGHT / (bottom - top)))


@lru_cache(maxsize=len(FONT_FACES) * len(WORDS))
def _drawn(word: str, face: str) -> Image.Image:
    """`word` in `face`, upright, large, as a mask (mode "L", 255 is ink) cut to its ink."""
    font = _font(face)
    left, top, right, bottom = font.getbbox(word)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), word, fill=255, font=font)
    return mask


def _check_size(height: int, width: int) -> None:
    if height < _MIN_HEIGHT:
        raise ValueError(f"height is {height}; it must be at least {_MIN_HEIGHT} pixels")
    if width < _MIN_WIDTH:
        raise ValueError(f"width is {width}; it must be at least {_MIN_WIDTH} pixels")


def render_word(word: str, rng: np.random.Generator, height: int = 32, width: int = 128) -> Image.Image:
    """Draws one word in a random face, size, place, tilt and pair of colours, on a uniform background.

    Face, size, tilt, ink and paper are drawn from `FONT_FACES`, `CAP_HEIGHTS`, `TILTS`, `INKS` and `PAPERS`, the place
    from the multiples of `STEPS` in the room that is left inside `MARGIN`, all uniformly and independently. Few values
    of each make many pictures together, and a small model learns them sooner than a continuum.

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
    mask = mask.rotate(TILTS[rng.integers(len(TILTS))], Image.Resampling.BICUBIC, expand=True)
    mask = mask.crop(mask.getbbox())

    room_x, room_y = width - 2 * MARGIN, height - 2 * MARGIN
    fit = min(room_x / mask.width, room_y / mask.height)
    scale = min(fit, CAP_HEIGHTS[rng.integers(len(CAP_HEIGHTS))] * height / _DRAWN_CAP_HEIGHT)
    mask = mask.resize((max(1, int(mask.width * scale)), max(1, int(mask.height * scale))), Image.Resampling.BICUBIC)

    ink, paper = INKS[rng.integers(len(INKS))], PAPERS[rng.integers(len(PAPERS))]
    place = (
        MARGIN + STEPS[1] * int(rng.integers((room_x - mask.width) // STEPS[1] + 1)),
        MARGIN + STEPS[0] * int(rng.integers((room_y - mask.height) // STEPS[0] + 1)),
    )
    picture = Image.new("RGB", (width, height), paper)
    picture.paste(ink, place, mask)
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
