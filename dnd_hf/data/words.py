"""Rendered words: small images of one English word each, made on the fly, for class-conditional models of text.

The smallest member of the rich-text family: the label is the word, the image varies in face, size, place, colours
and tilt, and an OCR engine can tell whether a generated image says what it was asked to say
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

CELLS = 4
"""Cells that an image is high, of 8 pixels at 32 as the tokenizer's; words stand at multiples of them."""

PITCH = 2
"""Cells from one letter to the next."""

CAP_HEIGHTS = (2.0, 2.25)
"""Heights of the capitals in cells: 16 and 18 pixels at 32."""

BASELINES = (2.375, 3.375)
"""Where the letters stand, in cells from the top: 19 and 27 pixels at 32."""

TILTS = (-1.0, 0.0, 1.0)
"""Rotations of a word about its middle, in degrees."""

_GAP = 0.3  # cells between two letters that fill theirs
_OVERSAMPLING = 4  # words are drawn larger than they are shown, so that tilting them leaves no jagged edges
_MIN_HEIGHT, _MIN_WIDTH = 16, 64


@cache
def _font(face: str, cap_height: int) -> ImageFont.FreeTypeFont:
    """`face` at the size that makes its letter "H" about `cap_height` pixels high."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            'rendering words needs the fonts of matplotlib: pip install ".[text]" in a clone of dnd_hf'
        ) from error
    path = str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf"))
    _, top, _, bottom = ImageFont.truetype(path, 100).getbbox("H")
    return ImageFont.truetype(path, 100 * cap_height / (bottom - top))


@lru_cache(maxsize=4096)
def _letter(letter: str, face: str, cap_height: int, cell: int) -> tuple[Image.Image, int]:
    """Mask of a letter (mode "L", 255 is ink) in the middle of `PITCH` cells, and the row in it of the baseline."""
    font = _font(face, cap_height)
    left, top, right, bottom = map(round, font.getbbox(letter, anchor="ls"))
    mask = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), letter, fill=255, font=font, anchor="ls")
    width = min(mask.width, round((PITCH - _GAP) * cell))
    mask = mask.resize((width, mask.height), Image.Resampling.BICUBIC)
    centred = Image.new("L", (PITCH * cell, mask.height))
    centred.paste(mask, ((centred.width - mask.width) // 2, 0))
    return centred, -top


def _check_size(height: int, width: int) -> None:
    if height < _MIN_HEIGHT:
        raise ValueError(f"height is {height}; it must be at least {_MIN_HEIGHT} pixels")
    if width < _MIN_WIDTH:
        raise ValueError(f"width is {width}; it must be at least {_MIN_WIDTH} pixels")


def render_word(word: str, rng: np.random.Generator, height: int = 32, width: int = 128) -> Image.Image:
    """Draws one word in a random face, size, place, tilt and pair of colours, on a uniform background.

    Face, size, line, tilt, ink and paper are drawn from `FONT_FACES`, `CAP_HEIGHTS`, `BASELINES`, `TILTS`, `INKS` and
    `PAPERS`, the column from those of whole cells that leave room for the word, all uniformly and independently.
    Letters stand `PITCH` cells apart, as on a typewriter, and wide ones are narrowed: then a letter has the same codes
    wherever it stands, and a small model learns it soon.

    Args:
        word: at least one visible character. Made for capitals: on the lower line the end of a tail may be cut off.
        rng: the only source of randomness.
        height, width: size of the image in pixels, at least 16 and 64. A word that does not fit is drawn smaller.

    Returns:
        RGB image of `width` x `height` pixels.

    Raises:
        ValueError: `word` is blank or has more than `width / PITCH` letters, or `height` or `width` is too small.
        ImportError: matplotlib, whose fonts are used, is not installed.
    """
    if not word.strip():
        raise ValueError(f"word is {word!r}; it must have at least one visible character")
    _check_size(height, width)
    if len(word) > width // PITCH:
        raise ValueError(f"word has {len(word)} letters; {width} pixels are too narrow for more than {width // PITCH}")
    face = FONT_FACES[rng.integers(len(FONT_FACES))]
    cap_height, baseline, tilt = (numbers[rng.integers(len(numbers))] for numbers in (CAP_HEIGHTS, BASELINES, TILTS))
    ink, paper = (colours[rng.integers(len(colours))] for colours in (INKS, PAPERS))
    cell = max(1, min(height // CELLS, width // (PITCH * len(word))))
    large = cell * _OVERSAMPLING
    letters = [_letter(letter, face, round(cap_height * large), large) for letter in word]
    length = sum(letter.width for letter, _ in letters)
    x = large * int(rng.integers((width * _OVERSAMPLING - length) // large + 1))
    y = round(baseline * large)

    mask = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    middle = (x + length / 2, y - cap_height * large / 2)
    for letter, above in letters:
        mask.paste(letter, (x, y - above))
        x += letter.width
    mask = mask.rotate(tilt, Image.Resampling.BICUBIC, center=middle).reduce(_OVERSAMPLING)
    image = Image.new("RGB", (width, height), paper)
    image.paste(ink, mask=mask)
    return image


class WordImages(Dataset):
    """Images of the 100 `WORDS`, rendered when asked for; image i depends on `(seed, i)` only.

    Args:
        num_images: length, at least 1. Labels go round (`i % 100`), so a multiple of 100 has classes of equal size.
        seed: non-negative. Two seeds give independent streams of images.
        height, width: size of the images in pixels, at least 16 and 64.

    Items are `{"image": PIL.Image.Image, "label": int, "text": str}`: an RGB image of `width` x `height`, a label in
    [0, 100), and its word, `class_names[label]`. A negative index counts from the end.

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
        image = render_word(WORDS[label], rng, self.height, self.width)
        return {"image": image, "label": label, "text": WORDS[label]}
