"""Trains a rival of the claim C4: a pixel DDPM, or flow matching on the latents of a tokenizer.

python examples/claims/diffusion.py --rival ddpm --dataset_name images --image_size 64 128 --output_dir ddpm
python examples/claims/diffusion.py --rival flow --dataset_name images --vqvae rqvae --output_dir flow
python examples/claims/diffusion.py --config ... --resume_from_checkpoint latest

The loop is that of train.py: averaged weights, exact resume, validation on held-out images at the same noise. It prints
the parameters and the floating point operations (FLOPs) of a step, by which rivals are made equal; --max_training_flops
makes so many steps of them. sample_diffusion.py draws from the result.
"""

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import set_seed
from rivals import LatentFlow, PixelDDPM, training_flops
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE
from dnd_hf.arguments import RunArguments
from dnd_hf.command_line import run_script
from dnd_hf.data.images import collate_images, to_images
from dnd_hf.ops.number_checks import height_width
from dnd_hf.training.environment import RunEnvironment
from dnd_hf.training.images import load_training_images
from dnd_hf.training.optimization import weight_decay_groups
from dnd_hf.training.run import TrainingRun


NUM_SCALE_IMAGES = 256
"""Images whose latents say how all latents are scaled."""

UNET_MULTIPLE = 32
"""Channels of the U-Net are multiples of this: the width of a head, and twice the groups of a normalisation."""


@dataclass
class DiffusionArguments(RunArguments):
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    rival: Literal["ddpm", "flow"] = HfArg(default="ddpm", help="Diffusion of pixels, or flow matching of latents.")
    vqvae: str | None = HfArg(default=None, help="Of flow: the tokenizer, a folder or a Hub id.")
    image_size: list[int] | None = HfArg(default=None, help="Of ddpm: height and width in pixels, or one for both.")
    patch_size: int = HfArg(default=1, help="Of ddpm: squares of so many pixels each way are laid into channels.")
    block_out_channels: list[int] = HfArg(
        default_factory=lambda: [32, 64, 96, 128], help="Of ddpm: channels of each level, highest resolution first."
    )
    layers_per_block: int = HfArg(default=2, help="Of ddpm: residual blocks of a level.")
    attention_levels: int = HfArg(default=2, help="Of ddpm: levels with attention, from the lowest resolution.")
    num_hidden_layers: int = HfArg(default=6, help="Of flow: layers.")
    num_attention_heads: int = HfArg(default=4, help="Of flow: heads.")
    attention_head_dim: int = HfArg(default=64, help="Of flow: width of a head; the model's is heads times this.")
    learning_rate: float = HfArg(default=5e-4, help="Peak learning rate.")
    weight_decay: float = HfArg(default=0.0, help="Of matrices and convolutions; biases and gains do not decay.")
    max_training_flops: float | None = HfArg(
        default=None, help="Floating point operations of the whole training; the steps are at most so many."
    )
    num_samples: int = HfArg(default=8, help="Images of a sample grid; their seeds are always the same.")

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is None:
            raise ValueError("--dataset_name is needed: a data set on the Hub, or a folder.")
        if (self.rival == "flow") != (self.vqvae is not None):
            raise ValueError("--vqvae goes with --rival flow.")
        if (self.rival == "ddpm") != (self.image_size is not None):
            raise ValueError("--image_size goes with --rival ddpm; flow has the size of its tokenizer.")
        if not 0 <= self.attention_levels <= len(self.block_out_channels):
            raise ValueError(f"--attention_levels must be at most the {len(self.block_out_channels)} levels.")
        if any(channels % UNET_MULTIPLE for channels in self.block_out_channels):
            raise ValueError(f"--block_out_channels must be multiples of {UNET_MULTIPLE}.")
        if self.patch_size < 1:
            raise ValueError(f"--patch_size must be positive, got {self.patch_size}.")
        if self.max_training_flops is not None and self.max_training_flops <= 0:
            raise ValueError(f"--max_training_flops must be positive, got {self.max_training_flops}.")

    def make_ddpm(self, size: tuple[int, int]) -> PixelDDPM:
        """A new U-Net for images of `size` (height, width)."""
        if any(side % (self.patch_size * 2 ** (len(self.block_out_channels) - 1)) for side in size):
            raise ValueError(f"`image_size` {size} must be multiples of --patch_size and of what the levels halve.")
        plain = len(self.block_out_channels) - self.attention_levels
        return PixelDDPM.new(
            size,
            self.patch_size,
            block_out_channels=tuple(self.block_out_channels),
            layers_per_block=self.layers_per_block,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * self.attention_levels,
            up_block_types=("AttnUpBlock2D",) * self.attention_levels + ("UpBlock2D",) * plain,
            norm_num_groups=UNET_MULTIPLE // 2,
            attention_head_dim=UNET_MULTIPLE,
        )


class DiffusionTraining(TrainingRun):
    """Mean squared error of the predicted noise or velocity."""

    result_name = "rival"

    def __init__(self, args: DiffusionArguments):
        environment = RunEnvironment(args)
        device = environment.accelerator.device
        vqvae = RQVAE.from_pretrained(args.vqvae).to(device) if args.vqvae else None
        size = height_width(
            "sample_size" if vqvae else "image_size", vqvae.config.sample_size if vqvae else args.image_size
        )
        _, train_set, self.validation_set = load_training_images(args, size)
        set_seed(args.seed)
        if vqvae:
            first = collate_images([train_set[i] for i in range(min(NUM_SCALE_IMAGES, len(train_set)))])
            shape = args.num_hidden_layers, args.num_attention_heads, args.attention_head_dim
            self.rival = LatentFlow.new(vqvae.eval(), first["pixel_values"].to(device), *shape)
        else:
            self.rival = args.make_ddpm(size)
        network = self.rival.network.train()
        self.flops = training_flops(lambda: self.rival.loss(network, torch.zeros(1, *self.rival.shape, device=device)))
        network.zero_grad()
        if args.max_training_flops is not None:
            steps = max(1, round(args.max_training_flops / (self.flops * environment.samples_per_step)))
            steps = min(steps, args.max_train_steps)
            environment.args = args = replace(args, max_train_steps=steps, max_training_flops=None)
        if args.torch_compile:
            network.compile()
        super().__init__(
            environment,
            network,
            torch.optim.AdamW(weight_decay_groups(network, args.weight_decay), args.learning_rate, fused=True),
            train_set,
            collate_images,
            tokens_per_sample=self.rival.shape[1] * self.rival.shape[2],
            flops_per_sample=self.flops,
        )

    def train_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        with self.accelerator.accumulate(self.wrapped_model):
            loss = self.rival.loss(self.wrapped_model, self.rival.encode(batch["pixel_values"]))
            self.accelerator.backward(loss)
            metrics = self.clip_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"loss": loss, **metrics}

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        device, total = self.accelerator.device, torch.zeros(())
        with torch.random.fork_rng(), self.accelerator.autocast():
            torch.manual_seed(0)
            for batch in DataLoader(self.validation_set, self.args.train_batch_size, collate_fn=collate_images):
                clean = self.rival.encode(batch["pixel_values"].to(device))
                total += self.rival.loss(model, clean).cpu() * len(clean) / len(self.validation_set)
            if self.accelerator.is_main_process:
                self.show(to_images(self.rival.sample(range(self.args.num_samples))), 4, step)
        return {"loss": total.item()}

    def export(self, model: nn.Module, folder: Path) -> None:
        self.rival.save(folder)

    def summary(self) -> dict[str, str]:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        step = self.flops * self.environment.samples_per_step
        total = step * self.args.max_train_steps
        return super().summary() | {
            "compute": f"{parameters:,} parameters, {step:.4g} FLOPs a step, {total:.4g} in all"
        }

    def next_command(self) -> str:
        script = str(Path(__file__).with_name("sample_diffusion.py"))
        return shlex.join(
            ["python", os.path.relpath(script), "--model", self.args.output_dir, "--output_dir", "images"]
        )


def main(args: DiffusionArguments) -> None:
    DiffusionTraining(args).train()


if __name__ == "__main__":
    run_script(main, DiffusionArguments)
