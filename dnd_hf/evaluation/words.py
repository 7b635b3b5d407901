"""Does a model of rendered words write what it is asked to, and in as many ways as the real images show?

Two metrics, each beside the same metric of real images: the share of images that an OCR engine reads exactly as the
word asked for, and the spread of pixels among the images of one word, which collapses when a model repeats itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data.words import WORDS, WordImages, render_word
from ..ops.number_checks import whole_number
from .ocr import OCREngine, RapidOCR
from .options import REAL_SEED, PipelineOptions, check_ranges, option
from .reports import Report
from .text_metrics import exact_match


@dataclass
class WordsOptions(PipelineOptions):
    """Options of the task words."""

    num_images_per_word: int = option(20, "Images that `words` generates of each word, at least 2.")
    ocr_threads: int = option(1, "CPU threads of rapidocr.")


def check(options: WordsOptions) -> None:
    """Fills in the task's defaults. Raises ValueError for options that cannot work, before anything is loaded."""
    options.check_task("words", max_models=1, default_batch_size=100)
    check_ranges(options, least={"num_images_per_word": 2, "ocr_threads": 1})
    options.check_sampling()


def run(options: WordsOptions) -> Report:
    """The metrics of one pipeline. ValueError where it does not generate the words."""
    engine = RapidOCR(options.ocr_threads)
    (name,) = options.model
    pipeline = options.load_pipeline(name)
    check_classes(name, pipeline.transformer.config.id2label)
    metrics = evaluate_words(
        partial(pipeline, **options.sampling), options.num_images_per_word, options.seed, options.batch_size, engine
    )
    row = {metric: value for metric, value in metrics.items() if metric != "word_accuracy"}
    sampling = pipeline.transformer.generation_config.to_diff_dict() | options.sampling
    # "figures" is what results.json has called them from the first release on.
    return Report(rows=[{"model": name, **row}], details={"sampling": sampling, "figures": metrics})


def check_classes(name: str, id2label: Mapping[int, str]) -> None:
    """Raises ValueError, saying what the task needs, unless the classes of a pipeline are `WORDS` in their order."""
    if list(id2label.values()) != list(WORDS):
        raise ValueError(
            f"the task words needs a pipeline trained on the data set `words`, whose {len(WORDS)} classes are the words"
            f" {WORDS[0]} to {WORDS[-1]}; {name} has {len(id2label)} classes, the first {id2label[0]!r}. For the text"
            " in other models' images there is the task ppl_ocr, for their quality the task generation."
        )


def pixel_spread(images: np.ndarray, labels: Sequence[int] | np.ndarray) -> float:
    """Mean over labels of how much the images of a label differ, pixel by pixel.

    For each label: the (population) standard deviation of every pixel and channel over the label's images, on the
    scale [0, 1], averaged over pixels and channels. Every label that occurs counts the same.

    Args:
        images: uint8 array (n, H, W, 3), n at least 1.
        labels: n integers, the label of each image.

    Returns:
        Spread in [0, 0.5]; 0 when the images of each label are all equal.

    Raises:
        ValueError: `images` is not such an array, or `labels` is not as long.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(
            f"images is {images.dtype} of shape {images.shape}; it must be uint8 of shape (n, H, W, 3), n > 0"
        )
    labels = np.asarray(labels)
    if labels.shape != (len(images),):
        raise ValueError(f"labels has shape {labels.shape}; it must be ({len(images)},), one label for each image")
    return float(np.mean([(images[labels == label] / 255.0).std(axis=0).mean() for label in np.unique(labels)]))


def evaluate_words(
    pipeline: Callable,
    num_images_per_word: int = 20,
    seed: int = 0,
    batch_size: int = 100,
    engine: OCREngine | None = None,
) -> dict:
    """Generates every word of `WORDS`, renders as many unseen real images, and measures both alike.

    Args:
        pipeline: a `DnDPipeline` whose labels 0..99 are `WORDS`, called with labels, `generator` and `output_type`.
        num_images_per_word: images of each word, generated and real, at least 2 (a spread needs two).
        seed: non-negative. Generated image i has a CPU generator of its own, seeded `seed * n + i` of n in all; the
            real ones are `WordImages(n, seed=REAL_SEED + seed)`. The metrics do not depend on `batch_size`.
        batch_size: images generated at once, at least 1.
        engine: reads the images; `RapidOCR()` when None.

    Returns:
        `num_images` (n, of each kind), `accuracy` and `real_accuracy` (share read exactly, in [0, 1]) and
        `accuracy_ratio`; `spread` and `real_spread` (`pixel_spread`) and `spread_ratio`, each ratio generated over
        real (nan where the real accuracy is 0); `word_accuracy`, a dict from word to the share of its generated
        images read exactly.

    Raises:
        ValueError: an argument outside its range.
        ImportError: matplotlib is not installed, or no `engine` is given and `rapidocr-onnxruntime` is not.
    """
    whole_number("num_images_per_word", num_images_per_word, 2)
    whole_number("seed", seed, 0)
    whole_number("batch_size", batch_size)
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
    by_word = {word: exact_match(texts[i :: len(WORDS)], words[i :: len(WORDS)]) for i, word in enumerate(WORDS)}
    spread, real_spread = pixel_spread(images, labels), pixel_spread(real_images, labels)
    return {
        "num_images": num_images,
        "accuracy": accuracy,
        "real_accuracy": real_accuracy,
        "accuracy_ratio": accuracy / real_accuracy if real_accuracy else float("nan"),
        "spread": spread,
        "real_spread": real_spread,
        "spread_ratio": spread / real_spread,
        "word_accuracy": by_word,
    }


def _make_and_read(
    make: Callable[[int, int], np.ndarray], num_images: int, batch_size: int, engine: OCREngine, description: str
) -> tuple[np.ndarray, list[str]]:
    """All images that `make(start, stop)` makes batch by batch, uint8 (num_images, H, W, 3), and their texts."""
    images, texts = [], []
    with tqdm(total=num_images, desc=description, unit=" images") as progress:
        for start in range(0, num_images, batch_size):
            batch = make(start, min(start + batch_size, num_images))
            images.append(batch)
            texts += engine([Image.fromarray(image) for image in batch])
            progress.update(len(batch))
    return np.concatenate(images), texts
