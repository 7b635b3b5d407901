"""Draws docs/images/pdf_depths.png: crops of PDFs, and what 1, 2, 4 and 8 codes per position make of them.

python docs/draw_depths.py --vqvae pdf-8 --dataset_name pdf-figure --crops 54 24 60 72

docs/results.md has the commands that make tokenizer and crops.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import load_dataset
from matplotlib.figure import Figure
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE
from dnd_hf.command_line import run_script
from dnd_hf.data.images import ImageTransform


DEPTHS = (1, 2, 4, 8)
DPI = 100
GAP = 12  # pixels between images


@dataclass
class DrawingArguments:
    """Options of this script."""

    vqvae: str = HfArg(help="The tokenizer.")
    dataset_name: str = HfArg(help="A folder of make_pdf_images.py.")
    crops: list[int] = HfArg(help="Numbers of its crops, from top to bottom.")


def main(args: DrawingArguments) -> None:
    vae = RQVAE.from_pretrained(args.vqvae).eval()
    crops = load_dataset(args.dataset_name, split="train")[args.crops]["image"]
    width, height = crops[0].size
    transform = ImageTransform((height, width))
    images = torch.stack([transform(crop) for crop in crops])
    with torch.no_grad():
        codes = vae.encode(images).codes
        columns = {"PDF": images} | {
            f"{depth} code{'s' if depth > 1 else ''}": vae.decode_codes(codes, depth=depth).sample for depth in DEPTHS
        }
    heading = 2 * GAP
    across = len(columns) * (width + GAP) - GAP + 2
    down = heading + len(crops) * (height + GAP) - GAP + 2
    figure = Figure(figsize=(across / DPI, down / DPI), dpi=DPI)
    for column, (title, samples) in enumerate(columns.items()):
        left = 1 + column * (width + GAP)
        figure.text((left + width / 2) / across, 1 - GAP / down, title, fontsize=10, ha="center", va="center")
        for row, sample in enumerate(samples):
            bottom = down - 1 - heading - row * (height + GAP) - height
            axes = figure.add_axes((left / across, bottom / down, width / across, height / down), xticks=[], yticks=[])
            axes.imshow((sample.permute(1, 2, 0).clamp(-1, 1) + 1) / 2, interpolation="none")
            axes.spines[:].set(color="0.8", linewidth=0.7)
    figure.savefig(Path(__file__).parent / "images" / "pdf_depths.png", facecolor="white")


if __name__ == "__main__":
    run_script(main, DrawingArguments)
