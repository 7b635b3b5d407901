# /// script
# requires-python = ">=3.11"
# dependencies = ["dnd-hf[text]"]
#
# [tool.uv.sources]
# dnd-hf = { path = "..", editable = true }
# ///
"""Trains the tokenizer: an RQVAE on any images, on one GPU or several, with LPIPS and a GAN loss if asked for.

python examples/train_rqvae.py --dataset_name words --sample_size 32 128 --block_out_channels 16 32 64 128 \
    --norm_num_groups 16 --layers_per_block 1 --latent_channels 64 --num_vq_embeddings 512 --code_depth 4 \
    --output_dir rqvae-words

The paper's tokenizer (arXiv 2410.01912): `--sample_size 256 --lpips_weight 1 --gan_weight 0.75` and the default shape,
with `accelerate launch` and 256 images a step.
"""

import os


if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("Loading the libraries ...", flush=True)

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE
from dnd_hf.arguments import RunArguments, refuse_other_values
from dnd_hf.command_line import loading, run_script
from dnd_hf.data.images import check_stride, collate_images, to_images
from dnd_hf.evaluation.code_usage import code_perplexity
from dnd_hf.models.autoencoder_rqvae import RQVAEOutput
from dnd_hf.ops.number_checks import height_width
from dnd_hf.ops.perceptual_loss import PerceptualLoss
from dnd_hf.training.discriminator import PatchDiscriminator
from dnd_hf.training.environment import RunEnvironment
from dnd_hf.training.images import load_training_images
from dnd_hf.training.losses import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss
from dnd_hf.training.run import TrainingRun
from dnd_hf.training.throughput import tokenizer_training_flops


@dataclass
class RQVAEArguments(RunArguments):
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    pretrained_vqvae: str | None = HfArg(
        default=None, help="Fine-tune this tokenizer (folder or Hub id); model options may only repeat its own."
    )
    sample_size: list[int] = HfArg(default_factory=lambda: [256], help="Height and width in pixels, or one for both.")
    block_out_channels: list[int] = HfArg(
        default_factory=lambda: [128, 128, 256, 256, 512],
        help="Channels of each level, highest resolution first; the stride is 2 ^ (levels - 1).",
    )
    layers_per_block: int = HfArg(default=2, help="Residual blocks of an encoder level; the decoder has one more.")
    latent_channels: int = HfArg(default=256, help="Channels between encoder and quantizer.")
    vq_embed_dim: int | None = HfArg(default=None, help="Length of a code vector; default: latent_channels.")
    num_vq_embeddings: int = HfArg(default=16384, help="Codebook size.")
    code_depth: int = HfArg(default=2, help="Residual codes of a position.")
    shared_codebook: bool = HfArg(default=True, help="One codebook for all depths.")
    codebook_decay: float = HfArg(default=0.99, help="EMA decay of the codebook.")
    norm_num_groups: int = HfArg(default=32, help="Groups of the group normalisations.")
    mid_block_add_attention: bool = HfArg(default=True, help="Attention in the middle blocks.")
    local_encoder: bool = HfArg(default=False, help="Encode each position from only its own pixels.")

    commitment_weight: float = HfArg(default=0.25, help="Weight of the commitment loss.")
    quantizer_start_step: int = HfArg(
        default=0,
        help="Until this step the decoder sees the latents unquantized: a warm-up that fills the codes sooner.",
    )
    freeze_codes: bool = HfArg(
        default=False, help="Train only the decoder: codes, and a transformer trained on them, stay as they are."
    )
    min_perplexity: float = HfArg(
        default=4.0, help="After the warmup, a run whose first depth uses its codes as if there were fewer ends."
    )
    lpips_weight: float = HfArg(default=0.0, help="Weight of LPIPS, which needs `lpips`; the paper's is 1.0.")
    gan_weight: float = HfArg(default=0.0, help="Weight of the PatchGAN hinge loss; the paper's is 0.75.")
    gan_start_step: int = HfArg(default=0, help="Step at which the GAN loss and its discriminator start.")
    discriminator_layers: int = HfArg(default=3, help="Convolutions of stride 2 in the discriminator.")
    adam_beta1: float = HfArg(default=0.5, help="Adam's first decay; the paper's, made for GANs. Without one, 0.9.")
    adam_beta2: float = HfArg(default=0.9, help="Adam's second decay; the paper's. Without a GAN, 0.99.")
    learning_rate: float = HfArg(default=1e-4, help="Peak learning rate; the paper's is 4e-5 at 256 images a step.")

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is None:
            raise ValueError("--dataset_name is needed: `words`, a data set on the Hub, or a folder.")
        height_width("sample_size", self.sample_size)
        if self.freeze_codes and not self.pretrained_vqvae:
            raise ValueError("--freeze_codes goes with --pretrained_vqvae: a new tokenizer has no codes to keep.")
        for name in (
            "commitment_weight",
            "lpips_weight",
            "gan_weight",
            "gan_start_step",
            "quantizer_start_step",
            "min_perplexity",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}.")

    def make_vae(self) -> RQVAE:
        """The tokenizer to train: new, or `pretrained_vqvae`."""
        if not self.pretrained_vqvae:
            return RQVAE(**self.model_options())
        with loading(self.pretrained_vqvae):
            vae = RQVAE.from_pretrained(self.pretrained_vqvae)
        defaults = RQVAEArguments(dataset_name=self.dataset_name, output_dir=self.output_dir).model_options()
        given = {name: value for name, value in self.model_options().items() if value != defaults[name]}
        config = dict(vae.config) | dict(sample_size=height_width("sample_size", vae.config.sample_size))
        refuse_other_values(given, config, self.pretrained_vqvae)
        return vae

    def model_options(self) -> dict[str, Any]:
        """The arguments of a new `RQVAE`."""
        return dict(
            sample_size=height_width("sample_size", self.sample_size),
            block_out_channels=tuple(self.block_out_channels),
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            vq_embed_dim=self.vq_embed_dim,
            num_vq_embeddings=self.num_vq_embeddings,
            code_depth=self.code_depth,
            shared_codebook=self.shared_codebook,
            ema_decay=self.codebook_decay,
            commitment_weight=self.commitment_weight,
            norm_num_groups=self.norm_num_groups,
            mid_block_add_attention=self.mid_block_add_attention,
            local_encoder=self.local_encoder,
        )


def validate(accelerator: Accelerator, vae: RQVAE, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """Reconstruction error with the first k codes, and use of the codebook, for each depth k, on the whole data set.

    The L2 error is the mean squared difference of pixels in [-1, 1]. Usage is the part of the codebook that occurs at
    all, perplexity the exponential of the codes' entropy, norm the mean length of the code vectors as they occur (the
    paper's Figure 4).
    """
    depth, vocab_size = vae.config.code_depth, vae.config.num_vq_embeddings
    errors = torch.zeros(depth, device=accelerator.device)
    counts = torch.zeros(depth, vocab_size, device=accelerator.device)
    mine = Subset(dataset, range(accelerator.process_index, len(dataset), accelerator.num_processes))
    for batch in DataLoader(mine, batch_size, collate_fn=collate_images):
        images = batch["pixel_values"].to(accelerator.device)
        codes = vae.encode(images).codes
        for k in range(depth):
            sample = vae.decode_codes(codes, depth=k + 1).sample.clamp(-1, 1)
            errors[k] += F.mse_loss(sample, images) * len(images) / len(dataset)
            counts[k] += codes[..., k].flatten().bincount(minlength=vocab_size)
    errors, counts = accelerator.reduce(errors), accelerator.reduce(counts)
    perplexities, usage = code_perplexity(counts), (counts > 0).float().mean(1)
    metrics = {"psnr": (10 * torch.log10(4 / errors[-1])).item()}
    for k in range(depth):
        metrics[f"l2_depth_{k + 1}"] = errors[k].item()
        metrics[f"usage_depth_{k + 1}"] = usage[k].item()
        metrics[f"perplexity_depth_{k + 1}"] = perplexities[k].item()
        norms = vae.quantizer.codebook(k).norm(dim=1)
        metrics[f"norm_depth_{k + 1}"] = ((counts[k] * norms).sum() / counts[k].sum()).item()
    return metrics


def reconstructions(vae: RQVAE, images: Tensor) -> Tensor:
    """`(batch, 1 + depth, 3, H, W)`: each image, then what its first 1, 2, ... codes make of it."""
    codes = vae.encode(images).codes
    partial = (vae.decode_codes(codes, depth=k + 1).sample for k in range(vae.config.code_depth))
    return torch.stack([images, *partial], dim=1)


class RQVAETraining(TrainingRun):
    """L2, commitment, and where asked for LPIPS and a GAN loss with a discriminator of its own."""

    result_name = "vqvae"

    def __init__(self, args: RQVAEArguments):
        environment = RunEnvironment(args)
        accelerator = environment.accelerator
        set_seed(args.seed)
        vae = args.make_vae()
        size = height_width("sample_size", vae.config.sample_size)
        check_stride(size, vae.code_stride)
        discriminator = PatchDiscriminator(args.discriminator_layers) if args.gan_weight else None
        if discriminator and min(size) < discriminator.min_size:
            raise ValueError(f"the discriminator needs images of at least {discriminator.min_size} pixels each way.")
        self.perceptual_loss = PerceptualLoss().to(accelerator.device) if args.lpips_weight else None
        self.source, train_set, self.validation_set = load_training_images(args, size)
        first = [self.validation_set[i] for i in range(min(8, len(self.validation_set)))]
        self.preview = collate_images(first)["pixel_values"]

        if args.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        if args.torch_compile:
            vae.encoder.compile()
            vae.decoder.compile()
        if args.freeze_codes:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
        super().__init__(
            environment,
            vae.train(),
            self.make_optimizer(args, parameters),
            train_set,
            collate_images,
            tokens_per_sample=size[0] // vae.code_stride[0] * (size[1] // vae.code_stride[1]),
            flops_per_sample=tokenizer_training_flops(vae, size),
        )
        self.discriminator = self.wrapped_discriminator = self.discriminator_optimizer = None
        if discriminator:
            self.discriminator = discriminator
            self.wrapped_discriminator, self.discriminator_optimizer = accelerator.prepare(
                discriminator, self.make_optimizer(args, discriminator.parameters())
            )

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"digest_of_file_names": self.source.files_digest}

    @staticmethod
    def make_optimizer(args: RQVAEArguments, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam with the options of the run."""
        return torch.optim.Adam(parameters, args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), fused=True)

    def train_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        args, images = self.args, batch["pixel_values"]
        if args.freeze_codes:
            self.model.quantizer.eval()
        trained = (self.wrapped_model, self.wrapped_discriminator) if self.discriminator else (self.wrapped_model,)
        with self.accelerator.accumulate(*trained):
            output = self.wrapped_model(images, quantize=step >= args.quantizer_start_step)
            reconstruction_loss = F.mse_loss(output.sample, images)
            metrics = {"l2": reconstruction_loss, "commitment": output.commitment_loss} | self.perplexities(output)
            if self.perceptual_loss:
                metrics["lpips"] = self.perceptual_loss(output.sample, images)
                reconstruction_loss = reconstruction_loss + args.lpips_weight * metrics["lpips"]
            loss = reconstruction_loss + args.commitment_weight * output.commitment_loss
            adversarial = self.discriminator is not None and step >= args.gan_start_step
            if adversarial:
                generator_loss, weight = self.generator_loss(output.sample, reconstruction_loss)
                loss = loss + args.gan_weight * weight * generator_loss
                metrics |= {"generator": generator_loss, "adaptive_weight": weight}
            self.accelerator.backward(loss)
            metrics |= self.clip_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if adversarial:
                metrics["discriminator"] = self.train_discriminator(images, output.sample.detach())
        return {"loss": loss, **metrics}

    def perplexities(self, output: RQVAEOutput) -> dict[str, Tensor]:
        """The perplexity of each depth's codes in a batch; none before the quantizer has started."""
        codes = () if output.codes is None else output.codes.unbind(-1)
        counts = [one.flatten().bincount(minlength=self.model.config.num_vq_embeddings) for one in codes]
        return {f"perplexity_depth_{k}": code_perplexity(count) for k, count in enumerate(counts, start=1)}

    def generator_loss(self, samples: Tensor, reconstruction_loss: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the samples against the discriminator, and its weight beside the reconstruction loss."""
        # The bare discriminator, so that distributed training does not wait for its gradients here.
        self.discriminator.requires_grad_(False)
        generator_loss = hinge_generator_loss(self.discriminator(samples))
        self.discriminator.requires_grad_(True)
        weight = adaptive_weight(
            reconstruction_loss,
            generator_loss,
            self.model.decoder.conv_out.weight,
            reduce=lambda gradient: self.accelerator.reduce(gradient, "mean"),
        )
        return generator_loss, weight

    def train_discriminator(self, images: Tensor, samples: Tensor) -> Tensor:
        """One backward pass of the discriminator; returns its loss."""
        # One pass over both halves: distributed training allows one forward pass a backward pass.
        logits = self.wrapped_discriminator(torch.cat([images, samples]))
        loss = hinge_discriminator_loss(*logits.chunk(2))
        self.accelerator.backward(loss)
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()
        return loss

    def validate(self, model: RQVAE, step: int) -> dict[str, float]:
        if self.accelerator.is_main_process:
            columns = reconstructions(model, self.preview.to(self.accelerator.device))
            self.show(to_images(columns.flatten(0, 1)), columns.shape[1], step)
        return validate(self.accelerator, model, self.validation_set, self.args.train_batch_size)

    def check(self, metrics: dict[str, float], step: int) -> None:
        started = step > self.args.quantizer_start_step + self.args.lr_warmup_steps
        if started and metrics["perplexity_depth_1"] < self.args.min_perplexity:
            raise RuntimeError(
                f"the codebook has collapsed by step {step}: the perplexity of the first code is"
                f" {metrics['perplexity_depth_1']:.2f}, under --min_perplexity. {self.last_good_checkpoint} Try a lower"
                " --learning_rate, a larger batch, --quantizer_start_step, or a later --gan_start_step."
            )

    def export(self, model: RQVAE, folder: Path) -> None:
        model.save_pretrained(folder)

    def next_command(self) -> str:
        data = ["--dataset_name", self.args.dataset_name]
        if self.args.max_broken_share != RQVAEArguments.max_broken_share:
            data += ["--max_broken_share", str(self.args.max_broken_share)]
        return shlex.join(
            ["python", "examples/extract_codes.py", *data, "--vqvae", self.args.output_dir, "--output_dir", "codes"]
        )


def main(args: RQVAEArguments) -> None:
    RQVAETraining(args).train()


if __name__ == "__main__":
    run_script(main, RQVAEArguments)
