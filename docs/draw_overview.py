"""Draws docs/images/overview.png: what the bundled model `words` generates, and how an image sharpens with each code.

python docs/draw_overview.py
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from dnd_hf import DnDPipeline, bundled_checkpoint


ROWS, COLUMNS = 8, 3
LABELS = ("TIGER", "QUEEN", "ZEBRA", "CLOUD")


def main() -> None:
    pipe = DnDPipeline.from_pretrained(bundled_checkpoint("words"))
    count = ROWS * COLUMNS
    labels = [i * len(pipe.labels) // count for i in range(count)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    words = pipe(labels, generator=generators, output_type="np").images

    generators = [torch.Generator().manual_seed(seed) for seed in range(len(LABELS))]
    codes = pipe(LABELS, generator=generators, output_type="codes").images
    depths = range(1, pipe.vqvae.config.code_depth + 1)
    with torch.no_grad():
        partial = [pipe.vqvae.decode_codes(codes, depth=depth).sample for depth in depths]

    figure = Figure(figsize=(12, 3.1), layout="constrained", dpi=90)
    left, right = figure.subfigures(1, 2, width_ratios=[COLUMNS, len(depths)], wspace=0.03)
    left.suptitle(f"Generated from labels, seeds 0 to {count - 1}, not selected", fontsize=10)
    for axes, image in zip(left.subplots(ROWS, COLUMNS).flat, words):
        axes.imshow(image)
        axes.axis("off")
    right.suptitle("The same generated codes, decoded with 1, 2, 3 and 4 codes per position", fontsize=10)
    grid = right.subplots(len(LABELS), len(depths))
    for column, (depth, samples) in enumerate(zip(depths, partial)):
        for axes, sample in zip(grid[:, column], samples):
            axes.imshow((sample.permute(1, 2, 0).clamp(-1, 1) + 1) / 2)
            axes.axis("off")
        grid[0, column].set_title(f"{depth} code{'s' if depth > 1 else ''}", fontsize=9)
    figure.savefig(Path(__file__).parent / "images" / "overview.png", facecolor="white")


if __name__ == "__main__":
    main()
