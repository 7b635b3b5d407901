"""What models cost to train: parameters, and the floating point operations (FLOPs) of the training so far.

python examples/claims/training_compute.py --models C2/dnd-4/0 C4/ddpm C4/flow

`--models` are output folders of train.py or diffusion.py. torch's `FlopCounterMode` counts one image, forward and
backward; steps and images of a step are those of the newest checkpoint. The tokenizer is not counted.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from rivals import is_rival, load_rival, training_flops
from torch import nn
from transformers.hf_argparser import HfArg

from dnd_hf import DnDPipeline
from dnd_hf.command_line import run_script
from dnd_hf.figures import markdown_table
from dnd_hf.files import read_json
from dnd_hf.training.checkpoints import find_checkpoint
from dnd_hf.training.settings import FILE


RESULTS = ("pipeline", "rival")
"""What train.py and diffusion.py call the result inside a checkpoint."""


def network_and_flops(folder: Path) -> tuple[nn.Module | ModelMixin, int]:
    """The network that was trained, and the FLOPs of one image."""
    if is_rival(folder):
        rival = load_rival(folder)
        clean = torch.zeros(1, *rival.shape)
        return rival.network, training_flops(lambda: rival.loss(rival.network, clean))
    model = DnDPipeline.from_pretrained(folder).transformer.train()
    codes = torch.zeros(1, *model.config.grid_size, model.config.code_depth, dtype=torch.int64)
    labels = torch.zeros(1, dtype=torch.int64)
    return model, training_flops(lambda: model(labels, codes, labels=codes).loss)


def trained(folder: Path) -> dict[str, float]:
    """What a training has cost so far: `parameters`, `flops_per_image`, `images_per_step`, `steps`, `images`, `flops`.

    Raises:
        ValueError: the folder has no checkpoint.
    """
    steps, checkpoint = find_checkpoint(str(folder), "latest")
    if checkpoint is None:
        raise ValueError(f"{folder} has no checkpoint, which says how long it was trained.")
    network, flops = network_and_flops(next(checkpoint / name for name in RESULTS if (checkpoint / name).is_dir()))
    images = read_json(checkpoint / FILE)["facts"]["samples_per_step"]
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
        "flops_per_image": float(flops),
        "images_per_step": images,
        "steps": steps,
        "images": images * steps,
        "flops": float(flops * images * steps),
    }


HEADINGS = {
    "parameters": "parameters",
    "flops_per_image": "FLOPs an image",
    "images_per_step": "images a step",
    "steps": "steps",
    "flops": "FLOPs in all",
}


def row(folder: Path) -> dict:
    """One row of the table; ValueError without a checkpoint."""
    facts = trained(folder)
    return {"model": str(folder)} | {heading: facts[name] for name, heading in HEADINGS.items()}


@dataclass
class ComputeArguments:
    """Options of this script."""

    models: list[Path] = HfArg(help="Output folders of trainings.")


def main(args: ComputeArguments) -> None:
    print(markdown_table([row(folder) for folder in args.models], digits=4))


if __name__ == "__main__":
    run_script(main, ComputeArguments)
