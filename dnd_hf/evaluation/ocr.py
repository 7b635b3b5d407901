"""Reading pictures back: the one interface every OCR engine has here, an engine for single lines, the exact measure."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image


class OCREngine(Protocol):
    """Anything that turns RGB pictures into their texts: one string a picture, in order, "" where nothing is read."""

    def __call__(self, images: Sequence[Image.Image]) -> list[str]: ...


class RapidOCR:
    """Reads pictures of one line of text with PP-OCRv4, run by `rapidocr-onnxruntime`; its weights come in the package.

    Only the recogniser runs: the whole picture is taken for the line, so nothing is detected or turned. Pictures are
    read one by one: a text never depends on the pictures around it.

    Args:
        num_threads: CPU threads of the recogniser, at least 1. A line is too small a job to gain from many.

    Call with a sequence of RGB pictures (other modes are converted), at least 30 pixels high and wide, or they are
    enlarged first; returns a list of as many strings, "" where nothing is read.

    Raises:
        ImportError: `rapidocr-onnxruntime` is not installed.
        ValueError: `num_threads` below 1.
    """

    def __init__(self, num_threads: int = 1):
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
        try:
            import rapidocr_onnxruntime
        except ImportError as error:
            raise ImportError('reading text needs rapidocr-onnxruntime: pip install "dnd-hf[ocr]"') from error
        self._engine = rapidocr_onnxruntime.RapidOCR(intra_op_num_threads=num_threads, inter_op_num_threads=1)

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        texts = []
        for image in images:
            # The engine takes arrays for BGR, as OpenCV reads them.
            pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
            lines, _ = self._engine(pixels, use_det=False, use_cls=False)
            texts.append(lines[0][0])
        return texts


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts that are read exactly, case and all; only whitespace around a text is forgiven.

    Args:
        predictions, references: texts in the same order, as many of one as of the other, at least one.

    Returns:
        Share in [0, 1] of pairs that are equal.

    Raises:
        ValueError: the lengths differ or are 0.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"there are {len(predictions)} predictions and {len(references)} references; "
            "there must be as many of one as of the other, and at least one"
        )
    equal = sum(a.strip() == b.strip() for a, b in zip(predictions, references, strict=True))
    return equal / len(references)
