"""Draws docs/images/verses.png: pages that the bundled model `verses` was trained on, and pages that it wrote.

python docs/draw_verses.py --dataset_name images-train
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset
from matplotlib.figure import Figure
from transformers.hf_argparser import HfArg

from dnd_hf import DnDPipeline, bundled_checkpoint
from dnd_hf.command_line import run_script


COLUMNS, WRITTEN_ROWS = 8, 2
PAGES_APART = 20011
"""Pages of the data set between two that are shown: the training pages are in the order of the books."""


@dataclass
class DrawingArguments:
    """Options of this script."""

    dataset_name: str = HfArg(help="The training pages: a folder of make_text_images.py.")


def main(args: DrawingArguments) -> None:
    pages = load_dataset(args.dataset_name, split="train")
    given = [pages[i * PAGES_APART % len(pages)]["image"] for i in range(COLUMNS)]
    pipe = DnDPipeline.from_pretrained(bundled_checkpoint("verses"))
    count = COLUMNS * WRITTEN_ROWS
    written = pipe(num_images_per_label=count, generator=list(range(count))).images

    figure = Figure(figsize=(13, 5.6), layout="constrained", dpi=90, facecolor="#d8d4cc")
    above, below = figure.subfigures(2, 1, height_ratios=[1, WRITTEN_ROWS], hspace=0.02)
    for part, rows, images, title in (
        (above, 1, given, "What it was trained on: images of pages, nothing else"),
        (below, WRITTEN_ROWS, written, f"What it writes: seeds 0 to {count - 1}, not selected"),
    ):
        part.set_facecolor(figure.get_facecolor())
        part.suptitle(title, fontsize=11)
        for axes, image in zip(part.subplots(rows, COLUMNS).flat, images):
            axes.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255, interpolation="lanczos")
            axes.axis("off")
    figure.savefig(Path(__file__).parent / "images" / "verses.png")


if __name__ == "__main__":
    run_script(main, DrawingArguments)
