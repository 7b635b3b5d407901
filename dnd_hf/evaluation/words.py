"""Does a model of rendered words write what it is asked to, and in as many ways as the real pictures show?

Two figures, each beside the same figure of real pictures: the share of pictures that an OCR engine reads exactly as the
word asked for, and the spread of pixels among the pictures of one word, which collapses when a model repeats itself.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from dnd_hf.data.words import WORDS, WordImages, render_word
from dnd_hf.evaluation.ocr import OCREngine, RapidOCR, exact_match


REAL_SEED = 1_000_000
"""Real pictures come from `WordImages(seed=REAL_SEED + seed)`; training keeps to smaller seeds, so they are unseen."""


def pixel_spread(images: np.ndarray, labels: Sequence[int]) -> float:
    """Mean over labels of how much the pictures of a label differ, pixel by pixel.

    For each label: the (population) standard deviation of every pixel and channel over the label's pictures, on the
    scale [0, 1], averaged over pixels and channels. Every label that occurs counts the same.

    Args:
        images: uint8 array (n, H, W, 3), n at least 1.
        labels: n integers, the label of each picture.

    Returns:
        Spread in [0, 0.5]; 0 when the pictures of each label are all equal.

    Raises:
        ValueError: `images` is not such an array, or `labels` is not as long.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(
            f"images is {images.dtype} of shape {images.shape}; it must be uint8 of shape (n, H, W, 3), n > 0"
        )
    labels = np.asarray(labels)
    if labels.shape != (len(images),):
        raise ValueError(f"labels has shape {labels.shape}; it must be ({len(images)},), one label a picture")
    return float(np.mean([(images[labels == label] / 255.0).std(axis=0).mean() for label in np.unique(labels)]))


def evaluate_words(
    pipeline: Callable,
    num_images_per_word: int = 20,
    seed: int = 0,
    batch_size: int = 100,
    engine: OCREngine | None = None,
) -> dict:
    """Generates every word of `WORDS`, renders as many unseen real pictures, and measures both alike.

    Args:
        pipeline: a `DnDPipeline` whose labels 0..99 are `WORDS`, called with labels and `generator` alone.
        num_images_per_word: pictures of each word, generated and real, at least 2 (a spread needs two).
        seed: non-negative. Generated picture i has a CPU generator of its own, seeded `seed * n + i` of n in all; the
            real ones are `WordImages(n, seed=REAL_SEED + seed)`. The figures do not depend on `batch_size`.
        batch_size: pictures generated at once, at least 1.
        engine: reads the pictures; `RapidOCR()` when None.

    Returns:
        `num_images` (n, of each kind), `accuracy` and `real_accuracy` (share read exactly, in [0, 1]) and
        `accuracy_ratio`; `spread` and `real_spread` (`pixel_spread`) and `spread_ratio`, each ratio generated over
        real (nan where the real accuracy is 0); `word_accuracy`, a dict from word to the share of its generated
        pictures read exactly.

    Raises:
        ValueError: an argument outside its range.
        ImportError: matplotlib is not installed, or no `engine` is given and `rapidocr-onnxruntime` is not.
    """
    for name, value, least in (
        ("num_images_per_word", num_images_per_word, 2),
        ("seed", seed, 0),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    engine = RapidOCR() if engine is None else engine
    render_word(WORDS[0], np.random.default_rng(seed))  # where the fonts are missing, fail before the long generation
    num_images = num_images_per_word * len(WORDS)
    labels = np.arange(num_images) % len(WORDS)
    words = [WORDS[label] for label in labels]

    def generate(start: int, stop: int) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed * num_images + i) for i in range(start, stop)]
        images = pipeline(labels[start:stop].tolist(), generator=generators, output_type="np").images
        return (images * 255).round().astype(np.uint8)

    images, texts = _make_and_read(generate, num_images, batch_size, engine, "Generated words")
    real_dataset = WordImages(num_images, seed=REAL_SEED + seed, height=images.shape[1], width=images.shape[2])

    def render(start: int, stop: int) -> np.ndarray:
        return np.stack([np.asarray(real_dataset[i]["image"]) for i in range(start, stop)])

    real_images, real_texts = _make_and_read(render, num_images, batch_size, engine, "Real words")

    accuracy, real_accuracy = exact_match(texts, words), exact_match(real_texts, words)
    spread, real_spread = pixel_spread(images, labels), pixel_spread(real_images, labels)
    return {
        "num_images": num_images,
        "accuracy": accuracy,
        "real_accuracy": real_accuracy,
        "accuracy_ratio": accuracy / real_accuracy if real_accuracy else float("nan"),
        "spread": spread,
        "real_spread": real_spread,
        "spread_ratio": spread / real_spread,
        "word_accuracy": {
            word: exact_match(texts[label :: len(WORDS)], words[label :: len(WORDS)])
            for label, word in enumerate(WORDS)
        },
    }


def _make_and_read(
    make: Callable[[int, int], np.ndarray], num_images: int, batch_size: int, engine: OCREngine, description: str
) -> tuple[np.ndarray, list[str]]:
    """All pictures that `make(start, stop)` makes batch by batch, uint8 (num_images, H, W, 3), and their texts."""
    images, texts = [], []
    with tqdm(total=num_images, desc=description, unit="image") as progress:
        for start in range(0, num_images, batch_size):
            batch = make(start, min(start + batch_size, num_images))
            images.append(batch)
            texts += engine([Image.fromarray(image) for image in batch])
            progress.update(len(batch))
    return np.concatenate(images), texts
