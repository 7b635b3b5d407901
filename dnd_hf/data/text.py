"""Text-Image (arXiv 2410.01912, section 4): English prose to images of it, each kept with the words it shows.

The paper's images: 512 x 512 pixels, 32 pt, at most 100 words, a margin of 20 pixels. Words are drawn one after
another as they stand, so the languages are those written from left to right with spaces between words.
"""

import hashlib
import math
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from glob import glob
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Literal

import datasets
import numpy as np
from datasets import Features, Value
from PIL import Image, ImageDraw, ImageFont

from ..ops.number_checks import height_width
from .image_shards import Note
from .rows import open_rows


DEFAULT_FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")
"""Faces that matplotlib ships (extra `text`)."""

NUM_PROBES = 200
"""Characters of a font of which one at least must be drawable."""

_FILE_KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


class Face:
    """A font file at one size, and which characters it can show.

    Args:
        name: path of a font file, or the name of a face that matplotlib ships, such as "DejaVuSans".
        size: pixels an em, which Pillow calls points.

    Raises:
        ValueError: no font with outlines and Unicode characters, or a damaged one.
        ImportError: fontTools is not installed, or matplotlib where its face is asked for.
    """

    def __init__(self, name: str, size: int):
        try:
            from fontTools.ttLib import TTFont
        except ImportError as error:
            raise ImportError('drawing text needs fontTools: pip install ".[text]" in a clone of dnd_hf') from error
        self.path = font_path(name)
        try:
            with TTFont(self.path, lazy=True, fontNumber=0) as font:
                glyphs = font.getBestCmap() or {}
            # The basic layout is the same everywhere; Pillow's other one needs a library that may be missing.
            self.font = ImageFont.truetype(str(self.path), size, layout_engine=ImageFont.Layout.BASIC)
        except Exception as error:  # the readers raise whatever a damaged file leads them to
            raise ValueError(f"{name} is no font that can be used: {error}") from error
        if not glyphs:
            raise ValueError(f"{name} has no table of Unicode characters.")
        self._codes = {code for code, glyph in glyphs.items() if glyph != ".notdef"}
        self.line_height = sum(self.font.getmetrics())
        self.shows_character, self.length = cache(self._shows_character), cache(self._length)
        self.ink = lru_cache(64)(self.font.getbbox)  # of the lines of the image in hand
        if not any(map(self.shows_character, islice(map(chr, sorted(self._codes)), NUM_PROBES))):
            raise ValueError(f"{name} is damaged: none of its first {NUM_PROBES} characters can be drawn.")

    def _shows_character(self, character: str) -> bool:
        # Marks and right-to-left scripts have glyphs, but need shaping to be drawn where they belong.
        return (
            ord(character) in self._codes
            and unicodedata.category(character)[0] not in "CM"
            and unicodedata.bidirectional(character) not in ("R", "AL")
            and self._has_ink(character)
        )

    def _has_ink(self, character: str) -> bool:
        try:
            return self.font.getmask(character).getbbox() is not None
        except OSError:  # a damaged glyph
            return False

    def _length(self, text: str) -> float:
        """Pixels from the start of a text to the start of what follows; infinite for more than Pillow measures."""
        return self.font.getlength(text) if len(text) <= ImageFont.MAX_STRING_LENGTH else math.inf

    def shows(self, word: str) -> bool:
        """Whether every character of the word has a visible glyph here and is drawn rightly one after another."""
        return all(map(self.shows_character, word))


@cache
def _face(name: str, size: int) -> Face:
    return Face(name, size)


def font_path(name: str) -> Path:
    """The path of a font file, or of the face of this name that matplotlib ships."""
    if Path(name).suffix:
        return Path(name)
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            'the default fonts are those of matplotlib: pip install ".[text]" in a clone of dnd_hf'
        ) from error
    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")


def split_words(text: str) -> list[str]:
    """The words of a text as they are drawn: composed characters (NFC), no invisible ones such as soft hyphens."""
    if not text.isascii():
        text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFC", text).split()


@dataclass
class TextImages:
    """Cuts texts into images of consecutive words, black on white, wrapped, from the top left corner.

    An image takes one of the fonts at random among those that can show its first word, and as many words as fit, up to
    `max_words`; it ends early before a word that its font cannot show, with which the next image begins. A word that
    no font can show, or that is larger than a line, is left out and counted, and no image goes across it.

    Args:
        fonts: files (.ttf, .otf), or names of faces that matplotlib ships.
        image_size: height and width, pixels; one number for a square.
        font_size: pixels an em, which Pillow calls points.
        margin: pixels along each edge that no ink touches.
        max_words, min_words: of an image; shorter ones (the end of a text) are left out and counted.
        line_spacing: at least 1, of the height of a line.
        line_height: pixels of a line, inside which its ink lies; default: the font's ascent and descent. Smaller, it
            removes the gap that a font leaves between lines; a word with ink beyond it is larger than a line.
        max_images: of a text, its first ones; default: all.
        seed: of the choice of fonts; text i depends on `(seed, i)` only.

    Raises:
        ValueError: an argument outside its range, a font that cannot be used, or no room for a line.
    """

    fonts: list[str] = field(default_factory=lambda: list(DEFAULT_FONTS))
    image_size: int | list[int] = 512
    font_size: int = 32
    margin: int = 20
    max_words: int = 100
    min_words: int = 1
    line_spacing: float = 1.0
    seed: int = 0
    line_height: int | None = None
    max_images: int | None = None

    features = Features(
        {"image": datasets.Image(), "text": Value("string"), "font": Value("string"), "source": Value("int64")}
    )

    def __post_init__(self):
        self.height, self.width = height_width("image_size", self.image_size)
        for name in ("font_size", "max_words", "min_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("line_height", "max_images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("margin", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.min_words > self.max_words:
            raise ValueError(f"`min_words` must not exceed `max_words`, got {self.min_words} and {self.max_words}.")
        if self.line_spacing < 1:
            raise ValueError(f"`line_spacing` must be at least 1, got {self.line_spacing}.")
        if not self.fonts:
            raise ValueError("`fonts` must name at least one font.")
        for name in self.fonts:
            line_height = self._line_height(_face(name, self.font_size))
            if self.width <= 2 * self.margin or self.height < 2 * self.margin + line_height:
                raise ValueError(
                    f"an image of {self.height} x {self.width} pixels has no room for a line of {line_height} pixels"
                    f" ({name}) inside a margin of {self.margin}."
                )

    def font_digests(self) -> list[str]:
        """SHA-256 of each font file: what the images depend on beside the arguments."""
        return [hashlib.sha256(font_path(name).read_bytes()).hexdigest() for name in self.fonts]

    def wrap(self, words: list[str], face: Face) -> list[str]:
        """The lines of an image that begins with the first of these words; [] where that is larger than a line."""
        room, line_height = self.width - 2 * self.margin, self._line_height(face)
        num_lines = 1 + int((self.height - 2 * self.margin - line_height) / (line_height * self.line_spacing))
        lines: list[str] = []
        start = 0
        while len(lines) < num_lines and start < min(len(words), self.max_words):
            end, length = start, 0.0
            for word in words[start : self.max_words]:
                if not face.shows(word):
                    break
                length += face.length(word)
                if length > room:
                    break
                end, length = end + 1, length + face.length(" ")
            # Ink may reach beyond the advance of the glyphs, or above and below the line.
            while end > start and not self._fits(" ".join(words[start:end]), face):
                end -= 1
            if end == start:
                break
            lines.append(" ".join(words[start:end]))
            start = end
        return lines

    def _line_height(self, face: Face) -> int:
        return self.line_height or face.line_height

    def _fits(self, line: str, face: Face) -> bool:
        left, top, right, bottom = face.ink(line)
        return right - min(left, 0) <= self.width - 2 * self.margin and top >= 0 and bottom <= self._line_height(face)

    def draw(self, lines: list[str], face: Face) -> Image.Image:
        """The image of these lines, mode "L"."""
        image = Image.new("L", (self.width, self.height), 255)
        canvas = ImageDraw.Draw(image)
        for number, line in enumerate(lines):
            left = min(face.ink(line)[0], 0)
            top = self.margin + int(number * self._line_height(face) * self.line_spacing)
            canvas.text((self.margin - left, top), line, fill=0, font=face.font)
        return image

    def rows(self, items: list[tuple[int, str]], note: Note) -> Iterator[dict]:
        """The images of texts (number in the source, text): `image`, its `text`, `font` and `source`, the number."""
        faces = [_face(name, self.font_size) for name in self.fonts]
        for source, text in items:
            rng = np.random.default_rng((self.seed, source))
            words = split_words(text)
            if not words:
                note.left_out["empty texts"] += 1
            start = num_images = 0
            while start < len(words) and num_images != self.max_images:
                order = rng.permutation(len(faces))
                chosen = next((number for number in order if faces[number].shows(words[start])), None)
                if chosen is None:
                    note.left_out["words that no font shows"] += 1
                    start += 1
                    continue
                face = faces[chosen]
                lines = self.wrap(words[start : start + self.max_words], face)
                if not lines:
                    note.left_out["words larger than a line"] += 1
                    start += 1
                    continue
                shown = " ".join(lines)
                num_words = shown.count(" ") + 1
                start += num_words
                if num_words < self.min_words:
                    note.left_out["images of too few words"] += 1
                    continue
                num_images += 1
                yield {"image": self.draw(lines, face), "text": shown, "font": face.path.name, "source": source}


def load_texts(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    column: str = "text",
    streaming: bool = False,
    sample_by: Literal["line", "paragraph", "document"] = "paragraph",
    num_texts: int | None = None,
) -> Iterator[tuple[int, str]]:
    """Opens a source of texts and returns its (number, text), always in the same order; nothing to read is "".

    Args:
        name: a data set on the Hub, a local folder, or .txt, .jsonl, .json, .csv or .parquet files (compressed or not;
            a pattern such as `books/*.txt` too). Files of any other name are text.
        config_name, split, streaming: as in `datasets.load_dataset`.
        column: of the texts.
        sample_by: what one text of .txt files is.
        num_texts: how many to use, the first ones; default: all.

    Raises:
        ValueError: no such split or column, or no texts in it, or damaged files; no such source: FileNotFoundError.
    """
    if num_texts is not None and num_texts < 1:
        raise ValueError(f"`num_texts` must be positive, got {num_texts}.")
    kind = next((_FILE_KINDS[suffix] for suffix in Path(name).suffixes if suffix in _FILE_KINDS), None)
    if kind is None and any(map(os.path.isfile, glob(name))):
        kind = "text"
    options = {"path": kind, "data_files": name} if kind else {"path": name, "name": config_name}
    if kind == "text":
        options["sample_by"] = sample_by
    rows = open_rows(name, split=split, streaming=streaming, **options)
    try:
        first = next(iter(rows), None)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} cannot be read: {shorten(str(error), 200)}") from error
    if first is None:
        raise ValueError(f"{name} has no texts in {split!r}.")
    if column not in first:
        raise ValueError(f"{name} has no column {column!r}; it has {list(first)}.")
    if not isinstance(first[column], str | None):
        raise ValueError(f"column {column!r} of {name} holds no texts but {type(first[column]).__name__}.")
    batches = rows.select_columns([column]).iter(batch_size=1000)
    texts = (text or "" for batch in batches for text in batch[column])
    return islice(enumerate(texts), num_texts)
