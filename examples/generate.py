"""Makes pictures with a trained pipeline and writes them as one grid, each from a seed of its own.

python examples/generate.py
python examples/generate.py --model dnd-b --labels tench goldfish 207 --num_images_per_label 4 --guidance_scale 2
"""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from dnd_hf import DnDPipeline
from dnd_hf.arguments import SamplingArguments, run_script
from dnd_hf.bundled import checkpoint_path
from dnd_hf.figures import save_image_grid


@dataclass
class GenerationArguments(SamplingArguments):
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    model: str = HfArg(default="words", help="`words` (comes with the package), a pipeline folder, or a Hub id.")
    labels: list[str] = HfArg(
        default_factory=list, help="Names or numbers of classes; default: 16 spread over all classes."
    )
    num_images_per_label: int = HfArg(default=1, help="Pictures of each label, side by side in the grid.")
    seed: int = HfArg(default=0, help="Picture i has the seed `seed + i`, whatever the batch size.")
    batch_size: int = HfArg(default=16, help="Pictures made at a time.")
    device: str | None = HfArg(default=None, help="Default: a GPU where there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(default="float32", help="Precision of the models.")
    output: str = HfArg(default="grid.png", help="The grid, a PNG file.")
    single_files: str | None = HfArg(default=None, help="Also write each picture into this folder.")

    def __post_init__(self):
        for name in ("num_images_per_label", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}.")


def main(args: GenerationArguments) -> None:
    device = args.device or torch.accelerator.current_accelerator() or "cpu"
    pipe = DnDPipeline.from_pretrained(checkpoint_path(args.model), dtype=getattr(torch, args.dtype)).to(device)
    names = pipe.transformer.config.id2label
    count = min(16, len(names))
    labels = [int(label) if label.isdecimal() else pipe.get_label_ids(label)[0] for label in args.labels]
    labels = labels or [i * len(names) // count for i in range(count)]
    labels = [label for label in labels for _ in range(args.num_images_per_label)]

    images, started = [], perf_counter()
    for first in range(0, len(labels), args.batch_size):
        batch = labels[first : first + args.batch_size]
        generators = [torch.Generator("cpu").manual_seed(args.seed + first + i) for i in range(len(batch))]
        images += pipe(batch, **args.sampling, generator=generators).images
    seconds = perf_counter() - started

    columns = args.num_images_per_label if args.num_images_per_label > 1 else max(1, round(len(images) ** 0.5))
    save_image_grid(images, columns, args.output)
    if args.single_files:
        folder = Path(args.single_files)
        folder.mkdir(parents=True, exist_ok=True)
        for i, (label, image) in enumerate(zip(labels, images)):
            image.save(folder / f"{i:06d}_class{label}_seed{args.seed + i}.png")
    print(f"{len(images)} images in {seconds:.1f} s ({len(images) / seconds:.2f} images/s) on {device}: {args.output}")


if __name__ == "__main__":
    run_script(main, GenerationArguments)
