"""Reads pages of a monospaced face whose letters fill cells exactly: each cell is the letter whose glyph is nearest.

A second reader beside the OCR engines. It knows the font and guesses nothing from the language: what it reads on a real
page is what was drawn, so a share of words that it reads is bounded by 1, and no engine's errors hide the model's.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dnd_hf.data.text import Face


class GlyphReader:
    """Reads pages drawn by `dnd_hf.data.text.TextImages` in one monospaced face, without margin.

    Args:
        characters: those that can be read; the space is among them anyway.
        font: a file, or the name of a face that matplotlib ships.
        font_size: pixels an em, which Pillow calls points.
        cell_size: height and width of a cell in pixels: the line height, and the advance of every letter.

    Call with a sequence of images, all of one size, which is whole cells; other modes than "L" are converted. It
    returns one string per image: its lines from top to bottom without spaces at their ends, joined by a newline; empty
    lines stay. Of glyphs at equal distance (mean squared difference of pixels) the first in code order is read.

    Raises:
        ValueError: the face lacks a character, or a glyph does not fill the cell: its advance is another, or its ink
            reaches beyond; images of several sizes, or that are not whole cells.
    """

    def __init__(
        self,
        characters: str,
        font: str = "DejaVuSansMono",
        font_size: int = 13,
        cell_size: tuple[int, int] = (16, 8),
    ):
        face = Face(font, font_size)
        self.cell_size = height, width = cell_size
        self.characters = "".join(sorted({" ", *characters}))
        for character in self.characters.strip():
            left, top, right, bottom = face.ink(character)
            if not face.shows(character):
                raise ValueError(f"`characters` has {character!r}, which {font} does not show.")
            if face.length(character) != width or left < 0 or top < 0 or right > width or bottom > height:
                raise ValueError(
                    f"{character!r} of {font} at {font_size} pixels does not fill a cell of `cell_size` {cell_size}:"
                    f" its advance is {face.length(character):g} pixels, its ink ends at ({right}, {bottom})."
                )
        self.glyphs: NDArray[np.float32] = np.stack([self._draw(character, face) for character in self.characters])

    def _draw(self, character: str, face: Face) -> NDArray[np.float32]:
        """The pixels of a cell, black 0 to white 255, flattened."""
        height, width = self.cell_size
        cell = Image.new("L", (width, height), 255)
        ImageDraw.Draw(cell).text((0, 0), character, fill=0, font=face.font)
        return np.asarray(cell, np.float32).ravel()

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        return [
            "\n".join("".join(self.characters[index] for index in row).rstrip() for row in page)
            for page in self.nearest(images)[0]
        ]

    def nearest(self, images: Sequence[Image.Image]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The nearest glyph of each cell, and how near it is.

        Returns:
            (images, rows, columns) indices into `characters`; and root mean squared differences of pixels, on the
            scale of 0 to 255: 0 where a cell shows a glyph exactly.
        """
        if not images:
            return np.zeros((0, 0, 0), np.int64), np.zeros((0, 0, 0), np.float32)
        sizes = {image.size for image in images}
        height, width = self.cell_size
        if len(sizes) > 1 or any(w % width or h % height for w, h in sizes):
            raise ValueError(
                f"`images` have sizes {sorted(sizes)}; one size is needed, in cells of {height} x {width}."
            )
        pixels = np.stack([np.asarray(image.convert("L"), np.float32) for image in images])
        pages, rows, columns = len(images), pixels.shape[1] // height, pixels.shape[2] // width
        cells = pixels.reshape(pages, rows, height, columns, width).swapaxes(2, 3).reshape(-1, height * width)
        # |cell - glyph|^2 without the differences themselves, which would be one array a cell and glyph.
        distances = (cells**2).sum(1)[:, None] - 2 * cells @ self.glyphs.T + (self.glyphs**2).sum(1)
        best = distances.argmin(1)
        rms = np.sqrt(((cells - self.glyphs[best]) ** 2).mean(1))
        return best.reshape(pages, rows, columns), rms.reshape(pages, rows, columns)
