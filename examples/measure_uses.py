"""Measures what else a trained model of words can do, each use beside an OCR engine. See docs/recipes.md.

python examples/measure_uses.py --use classify
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.hf_argparser import HfArg

from dnd_hf import DnDPipeline
from dnd_hf.arguments import run_script
from dnd_hf.bundled import checkpoint_path
from dnd_hf.data.words import WORDS, WordImages
from dnd_hf.evaluation.ocr import OCREngine, load_ocr_engine
from dnd_hf.evaluation.options import REAL_SEED
from dnd_hf.evaluation.text_metrics import exact_match
from dnd_hf.evaluation.words import check_classes
from dnd_hf.figures import markdown_table


@dataclass
class UsesArguments:
    """Options of this script."""

    use: Literal["classify"] = HfArg(help="What to measure.")
    model: str = HfArg(default="words", help="A pipeline of words: a folder, a Hub id or the name of a bundled one.")
    num_images: int = HfArg(default=100, help="Images; their words go round.")
    batch_size: int = HfArg(default=100, help="Sequences that pass the model at a time.")
    seed: int = HfArg(default=0, help="Of the rendered images and of the sampling.")

    def __post_init__(self):
        if min(self.num_images, self.batch_size) < 1 or self.seed < 0:
            raise ValueError("`num_images` and `batch_size` must be at least 1, `seed` at least 0.")


Row = dict[str, Any]


def classify(pipe: DnDPipeline, engine: OCREngine, args: UsesArguments) -> list[Row]:
    """The share of freshly rendered words that are read right: by the model as a classifier, and by OCR."""
    dataset = WordImages(args.num_images, seed=REAL_SEED + args.seed)
    images = [dataset[i]["image"] for i in range(args.num_images)]
    words = [WORDS[dataset[i]["label"]] for i in range(args.num_images)]
    labels = pipe.classify(images, batch_size=args.batch_size).labels.tolist()
    return [
        {"reader": "the model, among its 100 words", "read": exact_match([WORDS[label] for label in labels], words)},
        {"reader": "rapidocr-line, any text", "read": exact_match(engine(images), words)},
    ]


USES: dict[str, Callable[[DnDPipeline, OCREngine, UsesArguments], list[Row]]] = {"classify": classify}


def main(args: UsesArguments) -> None:
    engine = load_ocr_engine("rapidocr-line")
    pipe = DnDPipeline.from_pretrained(checkpoint_path(args.model))
    check_classes(args.model, pipe.transformer.config.id2label)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    print(markdown_table(USES[args.use](pipe, engine, args)))


if __name__ == "__main__":
    run_script(main, UsesArguments)
