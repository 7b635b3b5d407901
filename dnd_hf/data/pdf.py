"""arXiv-Image (arXiv 2410.01912, section 4): pages of PDFs to random crops, each with the text that lies inside it.

The paper's images: pages rendered at 1260 x 1782 pixels (A4 at 152 dpi), ten random crops of 512 x 512 from each. The
text comes from the PDF's own text layer, glyph by glyph, so that OCR of a reconstruction has a truth to compare with.
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from datasets import Features, Value

from ..ops.number_checks import height_width
from .image_shards import Note


UNKNOWN = "\ufffd"
"""Stands in texts for a glyph of which the PDF does not say what character it is."""


class PageItem(NamedTuple):
    """One page to make crops of, or, with a `reason`, a PDF that cannot be read."""

    number: int
    name: str
    page: int = 0
    reason: str | None = None


@dataclass
class PdfCrops:
    """Cuts random crops from the pages of all PDFs in a folder.

    A page is scaled, with its proportions, to the largest image that `page_size` holds. Crop places are uniform and
    may overlap; crops with less than `min_ink` are left out and counted, and so are pages smaller than a crop.

    Args:
        folder: where the PDFs (`*.pdf`) lie, subfolders included.
        page_size, crop_size: height and width, pixels; one number for a square.
        crops_per_page: how many are tried, at least 1.
        min_ink: in [0, 1], the least share of pixels darker than middle grey; two lines of 10 pt text are 0.01.
        seed: of the places; those of page p of the i-th PDF, in the order of names, depend on `(seed, i, p)` only.

    Raises:
        ValueError: an argument outside its range, or no PDF in the folder.
        ImportError: pypdfium2 is not installed.
    """

    folder: str | Path
    page_size: int | list[int] = field(default_factory=lambda: [1782, 1260])
    crop_size: int | list[int] = 512
    crops_per_page: int = 10
    min_ink: float = 0.01
    seed: int = 0

    features = Features(
        {
            "image": datasets.Image(),
            "text": Value("string"),
            "pdf": Value("string"),
            "page": Value("int64"),
            "left": Value("int64"),
            "top": Value("int64"),
        }
    )

    def __post_init__(self):
        page, crop = height_width("page_size", self.page_size), height_width("crop_size", self.crop_size)
        if crop[0] > page[0] or crop[1] > page[1]:
            raise ValueError(f"crops of {crop} pixels (height, width) do not fit into pages of {page}.")
        if self.crops_per_page < 1:
            raise ValueError(f"`crops_per_page` must be positive, got {self.crops_per_page}.")
        if not 0 <= self.min_ink <= 1:
            raise ValueError(f"`min_ink` must lie in [0, 1], got {self.min_ink}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must not be negative, got {self.seed}.")
        _pypdfium2()
        folder = Path(self.folder)
        paths = (path for path in folder.rglob("*") if path.suffix.lower() == ".pdf" and path.is_file())
        self.names = sorted(path.relative_to(folder).as_posix() for path in paths)
        if not self.names:
            raise ValueError(f"{folder} holds no PDFs.")

    def pdfs_digest(self) -> str:
        """SHA-256 of the names and sizes of the PDFs: what the crops depend on beside the arguments."""
        sizes = [(name, Path(self.folder, name).stat().st_size) for name in self.names]
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()

    def pages(self) -> Iterator[PageItem]:
        """Every page of every PDF in order; encrypted, broken and empty PDFs are one item with the reason."""
        pdfium = _pypdfium2()
        for number, name in enumerate(self.names):
            try:
                with pdfium.PdfDocument(Path(self.folder, name)) as pdf:
                    num_pages = len(pdf)
            except (pdfium.PdfiumError, OSError) as error:
                yield PageItem(number, name, reason=str(error))
                continue
            if not num_pages:
                yield PageItem(number, name, reason="it has no pages")
            for page in range(num_pages):
                yield PageItem(number, name, page)

    def rows(self, items: list[PageItem], note: Note) -> Iterator[dict]:
        """The crops of pages: `image`, its `text`, `pdf` and `page` (from 1), `left` and `top`, its place in pixels.

        The text is that of [`text_inside`].
        """
        pdfium = _pypdfium2()
        for (name, reason), pages in groupby(items, lambda item: (item.name, item.reason)):
            shown = os.fsencode(name).decode(errors="replace")  # file names may be any bytes
            if reason is not None:
                note.broken.append({"name": shown, "reason": reason})
                continue
            with pdfium.PdfDocument(Path(self.folder, name)) as pdf:
                for item in pages:
                    try:
                        with closing(pdf[item.page]) as page:
                            image, characters, boxes = self.read_page(page)
                    except pdfium.PdfiumError as error:
                        note.broken.append({"name": f"{shown}, page {item.page + 1}", "reason": str(error)})
                        continue
                    for crop in self._crops(item, image, characters, boxes, note):
                        yield {"pdf": shown, **crop}

    def _crops(self, item: PageItem, image, characters: list[str], boxes: np.ndarray, note: Note) -> Iterator[dict]:
        height, width = height_width("crop_size", self.crop_size)
        if image.height < height or image.width < width:
            note.left_out["pages smaller than a crop"] += 1
            return
        rng = np.random.default_rng((self.seed, item.number, item.page))
        for _ in range(self.crops_per_page):
            left, top = (int(rng.integers(room + 1)) for room in (image.width - width, image.height - height))
            place = (left, top, left + width, top + height)
            crop = image.crop(place)
            if (np.asarray(crop.convert("L")) < 128).mean() < self.min_ink:
                note.left_out["crops that are nearly empty"] += 1
                continue
            yield {
                "image": crop,
                "text": text_inside(characters, boxes, place),
                "page": item.page + 1,
                "left": left,
                "top": top,
            }

    def read_page(self, page) -> tuple:
        """Renders a page of pypdfium2 and finds its glyphs.

        Returns:
            The RGB image; the characters in reading order, with spaces and line breaks between them; and their boxes
            `(characters, 4)` in pixels: left, top, right, bottom.
        """
        pdfium = _pypdfium2()
        height, width = height_width("page_size", self.page_size)
        scale = min(width / page.get_width(), height / page.get_height())
        with closing(page.render(scale=scale * (1 - 1e-9))) as bitmap:  # its size is rounded up
            image = bitmap.to_pil().convert("RGB")
        characters, boxes = [], []
        with closing(page.get_textpage()) as textpage:
            for index in range(textpage.count_chars()):
                character = pdfium.raw.FPDFText_GetUnicode(textpage, index)
                box = textpage.get_charbox(index)
                if character in (0x02, 0xFFFE):  # how PDFium writes a hyphen at the end of a line
                    characters += ["-", "\n"]
                    boxes += [box, box]
                    continue
                character = chr(character)
                if pdfium.raw.FPDFText_HasUnicodeMapError(textpage, index) == 1 or (
                    unicodedata.category(character)[0] == "C" and not character.isspace()
                ):
                    character = UNKNOWN
                characters.append(character)
                boxes.append(box)
        return image, characters, _to_pixels(page, image.size, np.array(boxes).reshape(-1, 4))


def _pypdfium2():
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError('reading PDFs needs pypdfium2: pip install ".[pdf]" in a clone of dnd_hf') from error
    return pypdfium2


def _to_pixels(page, size: tuple[int, int], boxes: np.ndarray) -> np.ndarray:
    """Boxes `(n, 4)` in units of the page (left, bottom, right, top) as pixels (left, top, right, bottom)."""
    # PDFium knows about rotated and cropped pages, but rounds: it is asked about three points of a larger image.
    position = _pypdfium2().PdfPosConv(page, (0, 0, 100 * size[0], 100 * size[1], 0))
    origin, right, up = (np.array(position.to_bitmap(*point)) / 100 for point in ((0, 0), (1000, 0), (0, 1000)))
    axes = np.stack([right - origin, up - origin]) / 1000
    one, other = boxes[:, :2] @ axes + origin, boxes[:, 2:] @ axes + origin
    return np.concatenate([np.minimum(one, other), np.maximum(one, other)], axis=1)


def text_inside(characters: list[str], boxes: np.ndarray, place: tuple[int, int, int, int]) -> str:
    """The characters whose boxes lie inside `place`, in reading order.

    Words are divided as in the PDF; a line break stands for one or more in the PDF, and for glyphs that are not inside.

    Args:
        characters: each one character; those of white space count wherever they are.
        boxes: `(characters, 4)`, pixels: left, top, right, bottom.
        place: left, top, right, bottom, pixels.
    """
    left, top, right, bottom = place
    inside = np.all(boxes[:, :2] >= (left, top), axis=1) & np.all(boxes[:, 2:] <= (right, bottom), axis=1)
    text, gap = "", ""
    for character, is_inside in zip(characters, inside.tolist()):
        if character.isspace():
            gap = "\n" if character in "\r\n" else gap or " "
        elif not is_inside:
            gap = "\n"
        else:
            text, gap = text + (gap if text else "") + character, ""
    return text
