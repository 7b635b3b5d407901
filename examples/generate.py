# /// script
# requires-python = ">=3.11"
# dependencies = ["dnd-hf"]
#
# [tool.uv.sources]
# dnd-hf = { path = "..", editable = true }
# ///
"""Generates images with a trained pipeline and writes them as one grid, each from its own seed.

python examples/generate.py
python examples/generate.py --model dnd-b --labels tench goldfish 207 --num_images_per_label 4 --guidance_scale 2
python examples/generate.py --model verses --height 512 --temperature 0.5 --output page.png
"""

import os


if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("Loading the libraries ...", flush=True)

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from PIL import Image
from transformers.hf_argparser import HfArg

from dnd_hf import DnDPipeline
from dnd_hf.arguments import SamplingArguments
from dnd_hf.bundled import checkpoint_path
from dnd_hf.command_line import loading, run_script
from dnd_hf.figures import save_image_grid
from dnd_hf.generation.settings import SamplingSettings
from dnd_hf.messages import counted


@dataclass
class GenerationArguments(SamplingArguments):
    """Options of this script; they can also be in a YAML file given as `--config`."""

    model: str = HfArg(default="words", help="`words` or `verses` (bundled), a pipeline folder, or a Hub id.")
    labels: list[str] = HfArg(
        default_factory=list, help="Names or numbers of classes; default: 16 spread over all classes."
    )
    prompts: list[str] = HfArg(default_factory=list, help="Texts, for a model that reads text instead of labels.")
    num_images_per_label: int = HfArg(default=1, help="Images of each label or prompt, side by side in the grid.")
    height: int | None = HfArg(default=None, help="Pixels; more than the model's own are made in overlapping windows.")
    width: int | None = HfArg(default=None, help="Likewise.")
    overlap: int | None = HfArg(default=None, help="Cells by which these windows overlap; default: half of the grid.")
    seed: int = HfArg(default=0, help="Image i is generated from `seed + i`, whatever the batch size.")
    batch_size: int = HfArg(default=16, help="Images generated at once.")
    device: str | None = HfArg(default=None, help="Default: a GPU where there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(default="float32", help="Precision of the models.")
    output: str = HfArg(default="grid.png", help="File of the grid; its suffix says the format.")
    single_files: str | None = HfArg(default=None, help="Also write each image into this folder.")

    def __post_init__(self):
        for name in ("num_images_per_label", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.labels and self.prompts:
            raise ValueError("`labels` and `prompts` exclude each other.")
        if Path(self.output).suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"`output` must be the name of an image file, such as grid.png, got {self.output!r}.")
        SamplingSettings.check(**self.sampling)


def find_labels(pipe: DnDPipeline, labels: list[str]) -> list[int]:
    """The numbers of the classes that the option names; 16 spread over all classes where it names none."""
    num_classes = pipe.transformer.config.num_classes
    if not num_classes:
        raise ValueError("`prompts` are needed: this model reads text.")
    if not labels:
        count = min(16, num_classes)
        return [i * num_classes // count for i in range(count)]
    beyond = [label for label in labels if label.isdecimal() and int(label) >= num_classes]
    if beyond:
        raise ValueError(f"`labels` must be names or numbers in [0, {num_classes}), got {', '.join(beyond)}.")
    try:
        return [int(label) if label.isdecimal() else pipe.get_label_ids(label)[0] for label in labels]
    except ValueError as error:
        raise ValueError(str(error).replace("`class_labels`", "`labels`")) from error


def main(args: GenerationArguments) -> None:
    device = args.device or torch.accelerator.current_accelerator() or "cpu"
    with loading(args.model):
        pipe = DnDPipeline.from_pretrained(checkpoint_path(args.model), dtype=getattr(torch, args.dtype)).to(device)
    kind = "prompt" if args.prompts else "class_labels"
    conditions = args.prompts or find_labels(pipe, args.labels)
    conditions = [condition for condition in conditions for _ in range(args.num_images_per_label)]

    size = dict(height=args.height, width=args.width, overlap=args.overlap)
    images, started = [], perf_counter()
    for first in range(0, len(conditions), args.batch_size):
        batch = conditions[first : first + args.batch_size]
        generators = [torch.Generator("cpu").manual_seed(args.seed + first + i) for i in range(len(batch))]
        images += pipe(**{kind: batch}, **args.sampling, **size, generator=generators).images
    seconds = perf_counter() - started

    columns = args.num_images_per_label if args.num_images_per_label > 1 else max(1, round(len(images) ** 0.5))
    save_image_grid(images, columns, args.output)
    if args.single_files:
        folder = Path(args.single_files)
        folder.mkdir(parents=True, exist_ok=True)
        for i, (condition, image) in enumerate(zip(conditions, images)):
            made_from = f"prompt{i // args.num_images_per_label}" if args.prompts else f"class{condition}"
            image.save(folder / f"{i:06d}_{made_from}_seed{args.seed + i}.png")
    rate = f"{seconds:.1f} s, {len(images) / seconds:.2f} images/s on {device}"
    print(f"Saved {counted(len(images), 'image')} to {args.output} ({rate}).")


if __name__ == "__main__":
    run_script(main, GenerationArguments)
