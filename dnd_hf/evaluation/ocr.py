"""Reading the text in images: the one interface that every OCR engine has here, and three engines."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import transformers
from numpy.typing import ArrayLike
from PIL import Image


OCR_PROMPT = "Read all the text in the image, in reading order. Answer with that text alone."
"""What an image-text-to-text model is asked by default."""

MAX_NEW_TOKENS = 1024
"""Length at which the answer of such a model is cut off, here and in the official code of rOCR."""


class OCREngine(Protocol):
    """Anything that turns RGB images into their texts: one string for each, in order, "" where nothing is read."""

    def __call__(self, images: Sequence[Image.Image]) -> list[str]: ...


class RapidOCR:
    """Reads images with PP-OCRv4, run by `rapidocr-onnxruntime`; its weights come in the package.

    By default only the recogniser runs: the whole image is taken for one line, so nothing is detected or turned.
    With `detect_lines` the lines of a page are found first and joined by [`join_lines`]; lines that the engine is less
    than half sure of are left out, as the package does by itself. Images are read one by one: a text never depends
    on the images around it.

    Args:
        num_threads: CPU threads of each network, at least 1. A line is too small a job to gain from many.
        detect_lines: read pages instead of single lines.

    Call with a sequence of RGB images (other modes are converted), at least 30 pixels high and wide, or they are
    enlarged first; returns a list of as many strings, "" where nothing is read.

    Raises:
        ImportError: `rapidocr-onnxruntime` is not installed.
        ValueError: `num_threads` below 1.
    """

    def __init__(self, num_threads: int = 1, detect_lines: bool = False):
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
        try:
            import rapidocr_onnxruntime
        except ImportError as error:
            raise ImportError(
                'reading text needs rapidocr-onnxruntime: pip install ".[ocr]" in a clone of dnd_hf'
            ) from error
        self._engine = rapidocr_onnxruntime.RapidOCR(intra_op_num_threads=num_threads, inter_op_num_threads=1)
        self.detect_lines = detect_lines

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        texts = []
        for image in images:
            # The engine takes arrays for BGR, as OpenCV reads them.
            pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
            lines, _ = self._engine(pixels, use_det=self.detect_lines, use_cls=False)
            if self.detect_lines:
                texts.append(join_lines([line[0] for line in lines], [line[1] for line in lines]) if lines else "")
            else:
                texts.append(lines[0][0])
        return texts


def join_lines(boxes: ArrayLike, texts: Sequence[str]) -> str:
    """Pieces of text in reading order: rows from top to bottom, one per line; in a row from left to right, by a space.

    A piece belongs to a row if its middle is above the lower edge of the row's highest piece. Columns of a page are
    not told apart.

    Args:
        boxes: (n, 4, 2) corners (x, y) of each piece, in pixels, y downwards, in any order.
        texts: n strings.
    """
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4, 2)
    left, top, bottom = boxes[..., 0].min(1), boxes[..., 1].min(1), boxes[..., 1].max(1)
    middle = (top + bottom) / 2
    rows: list[list[int]] = []
    for i in np.argsort(middle, kind="stable"):
        if rows and middle[i] < bottom[rows[-1][0]]:
            rows[-1].append(i)
        else:
            rows.append([i])
    return "\n".join(" ".join(texts[i] for i in sorted(row, key=lambda i: left[i])) for row in rows)


class Tesseract:
    """Reads pages with Tesseract, through `pytesseract`.

    Args:
        language: of the installed language data, such as "eng" or "eng+deu".
        page_mode: Tesseract's page segmentation mode: 3 a whole page, 6 one block of text, 7 a single line.

    Call it as any [`OCREngine`]; whitespace around a text is removed.

    Raises:
        ImportError: `pytesseract`, the program `tesseract` or the language is not installed.
    """

    def __init__(self, language: str = "eng", page_mode: int = 3):
        try:
            import pytesseract
        except ImportError as error:
            raise ImportError('Tesseract needs pytesseract: pip install ".[eval]" in a clone of dnd_hf') from error
        try:
            installed = pytesseract.get_languages()
        except pytesseract.TesseractNotFoundError as error:
            raise ImportError("the program tesseract is not installed: apt install tesseract-ocr") from error
        missing = set(language.split("+")) - set(installed)
        if missing:
            raise ImportError(
                f"Tesseract has no language {', '.join(sorted(missing))}, only {', '.join(installed)}:"
                " apt install tesseract-ocr-<language>"
            )
        self._read, self.language, self.page_mode = pytesseract.image_to_string, language, page_mode

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        options = f"--psm {self.page_mode}"
        return [self._read(image.convert("RGB"), lang=self.language, config=options).strip() for image in images]


class ImageTextToTextOCR:
    """Asks any image-text-to-text model of transformers for the text, greedily, such as the paper's Qwen2-VL.

    Args:
        model: folder or Hub id.
        prompt: what the model is asked, after the image.
        device: where it runs; "auto" spreads it over all GPUs, for models that do not fit one.
        max_new_tokens: length at which an answer is cut off.

    Call it as any [`OCREngine`]. Images are read one by one: a text never depends on the images around it.

    Raises:
        ValueError: transformers cannot load such a model under this name.
    """

    def __init__(
        self,
        model: str,
        prompt: str = OCR_PROMPT,
        device: str | torch.device = "cpu",
        max_new_tokens: int = MAX_NEW_TOKENS,
    ):
        place = {"device_map": "auto"} if device == "auto" else {"device": device}
        try:
            self._pipeline = transformers.pipeline("image-text-to-text", model=model, **place)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{model!r} is no OCR engine of this package ({', '.join(OCR_ENGINES)}) and no image-text-to-text"
                f" model that transformers can load: {error}"
            ) from error
        self.prompt, self.max_new_tokens = prompt, max_new_tokens

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        texts = []
        for image in images:
            content = [{"type": "image", "image": image.convert("RGB")}, {"type": "text", "text": self.prompt}]
            answer = self._pipeline(
                text=[{"role": "user", "content": content}],
                return_full_text=False,
                generate_kwargs={"do_sample": False, "max_new_tokens": self.max_new_tokens},
            )
            texts.append(answer[0]["generated_text"].strip())
        return texts


OCR_ENGINES = ("rapidocr", "rapidocr-line", "tesseract")
"""Names that [`load_ocr_engine`] knows; every other is a model of transformers."""


def load_ocr_engine(
    name: str,
    prompt: str | None = None,
    language: str = "eng",
    device: str | torch.device = "cpu",
    num_threads: int = 1,
) -> OCREngine:
    """`rapidocr` (pages), `rapidocr-line` (single lines), `tesseract`, or the image-text-to-text model `name`.

    `prompt` (default: `OCR_PROMPT`) and `device` are for such a model, `language` for Tesseract,
    `num_threads` for rapidocr. Raises what the engines raise.
    """
    if name in ("rapidocr", "rapidocr-line"):
        return RapidOCR(num_threads, detect_lines=name == "rapidocr")
    if name == "tesseract":
        return Tesseract(language)
    return ImageTextToTextOCR(name, prompt or OCR_PROMPT, device)


def try_to_read(engine: OCREngine, image: Image.Image) -> tuple[str | None, str | None]:
    """The text with all whitespace, line breaks too, as single spaces, and None; or None and why it cannot be read."""
    try:
        (text,) = engine([image])
    except Exception as error:  # engines raise whatever an image leads them to; a long evaluation continues
        return None, f"{type(error).__name__}: {error}"
    return " ".join(text.split()), None
