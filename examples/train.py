# /// script
# requires-python = ">=3.11"
# dependencies = ["dnd-hf[text]"]
#
# [tool.uv.sources]
# dnd-hf = { path = "..", editable = true }
# ///
"""Trains a DnD-Transformer or an RQ-Transformer on codes of extract_codes.py, or on images with a tokenizer.

python examples/train.py --codes_dir codes --size B --output_dir dnd-b
python examples/train.py --dataset_name words --vqvae rqvae-words --hidden_size 256 --num_hidden_layers 6 \
    --num_attention_heads 4 --output_dir dnd-words

python examples/train.py --architecture rq_transformer --size 480M --dataset_name imagefolder --vqvae rqvae \
    --soft_code_temperature 0.5 --output_dir rq-transformer

The result, `output_dir`, is a whole pipeline: `DnDPipeline.from_pretrained(output_dir)`.
"""

import os


if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("Loading the libraries ...", flush=True)

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig, PreTrainedModel
from transformers.hf_argparser import HfArg
from transformers.utils.logging import disable_progress_bar

from dnd_hf import RQVAE, DnDPipeline
from dnd_hf.arguments import RunArguments, loading, run_script
from dnd_hf.data.codes import CodesDataset, collate_codes
from dnd_hf.data.images import check_stride, collate_images
from dnd_hf.generation.settings import SamplingSettings
from dnd_hf.ops.number_checks import height_width
from dnd_hf.training.architectures import ARCHITECTURES
from dnd_hf.training.data_order import hold_out
from dnd_hf.training.environment import RunEnvironment
from dnd_hf.training.images import load_training_images
from dnd_hf.training.optimization import weight_decay_groups
from dnd_hf.training.run import TrainingRun
from dnd_hf.training.settings import fingerprint, model_settings
from dnd_hf.training.soft_codes import soft_codes
from dnd_hf.training.throughput import transformer_training_flops


OPTIONS = {option for architecture in ARCHITECTURES.values() for option in architecture.options}


@dataclass
class DnDArguments(RunArguments):
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    codes_dir: str | None = HfArg(default=None, help="Folder of extract_codes.py; otherwise give --dataset_name.")
    vqvae: str | None = HfArg(default=None, help="The tokenizer for --dataset_name: a folder or a Hub id.")
    pretrained_transformer: str | None = HfArg(
        default=None, help="Fine-tune this transformer (folder or Hub id); its shape replaces the options of the model."
    )
    architecture: Literal["dnd", "rq_transformer"] = HfArg(
        default="dnd", help="What is trained; the defaults of the following options are those of its paper."
    )
    size: Literal["B", "L", "XL", "XXL", "XXXL", "355M", "480M", "612M", "821M", "1.4B", "3.8B"] | None = HfArg(
        default=None, help="Size of the paper (B; 480M); each of the following options replaces one of its numbers."
    )
    hidden_size: int | None = HfArg(default=None, help="Width.")
    num_hidden_layers: int | None = HfArg(default=None, help="Number of blocks (RQ-Transformer: of the body).")
    num_depth_layers: int | None = HfArg(default=None, help="Number of blocks of the RQ-Transformer's depth stack.")
    num_attention_heads: int | None = HfArg(default=None, help="Heads; those of DnD are each a multiple of 4 wide.")
    num_depth_attention_heads: int | None = HfArg(default=None, help="Heads of the depth stack; default: as many.")
    num_key_value_heads: int | None = HfArg(default=None, help="Fewer than the heads for grouped-query attention.")
    intermediate_size: int | None = HfArg(default=None, help="Width of the MLPs.")
    prediction_layers: list[int] | None = HfArg(default=None, help="0-based layer of each depth's head.")
    depth_mode: Literal["dnd", "vertical", "parallel"] | None = HfArg(default=None, help="Table 3 of the paper.")
    tie_prediction_heads: bool | None = HfArg(default=None, help="One output matrix for all depths.")
    class_dropout_prob: float | None = HfArg(
        default=None, help="Share of samples without class, 0.1 (RQ-Transformer: 0); 0: no guidance."
    )
    embedding_dropout: float | None = HfArg(default=None, help="Dropout of the input tokens, 0.1 (RQ-Transformer: 0).")
    residual_dropout: float | None = HfArg(
        default=None, help="Dropout of the attention output (RQ-Transformer: and of the MLP's), 0.1."
    )
    mlp_dropout: float | None = HfArg(default=None, help="Dropout of the MLP output, 0.1.")
    drop_path_rate: float | None = HfArg(default=None, help="Stochastic depth of the last layer, 0.")
    initializer_range: float | None = HfArg(default=None, help="Standard deviation of the initial weights, 0.02.")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] = HfArg(
        default="sdpa", help="How attention is computed while training; `eager` is fast for a compiled small grid."
    )

    learning_rate: float | None = HfArg(
        default=None,
        help="Peak; default: the paper's, 1e-4 per 256 samples of one optimizer step (RQ-Transformer: 5e-4).",
    )
    weight_decay: float | None = HfArg(
        default=None, help="Of matrices, 0.05 (RQ-Transformer: 1e-4); biases and gains do not decay."
    )
    soft_code_temperature: float | None = HfArg(
        default=None,
        help="With --dataset_name: learn a distribution over the codes, the nearer the likelier; 0.5 in the paper.",
    )
    stochastic_codes: bool = HfArg(default=True, help="With soft targets: the model reads codes drawn from them.")
    guidance_scale: float = HfArg(default=2.0, help="Of the sample grids, and the default of the saved pipeline.")
    temperature: float = HfArg(default=1.0, help="Likewise; the paper's is 0.1 for images of text.")
    num_samples: int = HfArg(default=16, help="Images of a sample grid; their seeds are always the same.")

    def __post_init__(self):
        super().__post_init__()
        if (self.codes_dir is None) == (self.dataset_name is None):
            raise ValueError("give either --codes_dir or --dataset_name.")
        if (self.codes_dir is None) == (self.vqvae is None):
            raise ValueError("--vqvae goes with --dataset_name; a codes folder has its own tokenizer.")
        if self.temperature <= 0:
            raise ValueError(f"--temperature must be positive, got {self.temperature}.")
        if self.num_samples < 1:
            raise ValueError(f"--num_samples must be positive, got {self.num_samples}.")
        if self.soft_code_temperature is not None and self.codes_dir is not None:
            raise ValueError("--soft_code_temperature goes with --dataset_name: stored codes have no distances.")
        if self.soft_code_temperature is not None and self.soft_code_temperature <= 0:
            raise ValueError(f"--soft_code_temperature must be positive, got {self.soft_code_temperature}.")
        self._complete()

    def _complete(self) -> None:
        """Fills in the defaults of the architecture."""
        architecture = ARCHITECTURES[self.architecture]
        self.size = self.size or architecture.default_size
        if self.size not in architecture.sizes:
            raise ValueError(f"--size of {self.architecture} must be one of {', '.join(architecture.sizes)}.")
        if self.weight_decay is None:
            self.weight_decay = architecture.weight_decay
        for name in sorted(OPTIONS):
            if name not in architecture.options and getattr(self, name) is not None:
                raise ValueError(f"--{name} is no option of --architecture {self.architecture}.")
            if name in architecture.options and getattr(self, name) is None:
                setattr(self, name, architecture.options[name])

    def make_transformer(self, vae: RQVAE, grid_size: tuple[int, int], class_names: list[str]) -> PreTrainedModel:
        """The transformer to train: new, or `pretrained_transformer`."""
        architecture = ARCHITECTURES[self.architecture]
        if self.pretrained_transformer:
            with loading(self.pretrained_transformer):
                found = AutoConfig.from_pretrained(self.pretrained_transformer).model_type
            if found != self.architecture:
                raise ValueError(f"{self.pretrained_transformer} is of --architecture {found}.")
            model = architecture.model_class.from_pretrained(self.pretrained_transformer, dtype=torch.float32)
            if tuple(model.config.grid_size) != grid_size or model.config.num_classes != len(class_names):
                raise ValueError(
                    f"the data has a grid of {grid_size} and {len(class_names)} classes; {self.pretrained_transformer}"
                    f" was made for {tuple(model.config.grid_size)} and {model.config.num_classes}."
                )
            return model
        names = dict(num_classes=len(class_names), id2label=dict(enumerate(class_names)))
        options = {name: getattr(self, name) for name in architecture.options}
        return architecture.make(self.size, options, vae, grid_size=grid_size, **names)


class DnDTraining(TrainingRun):
    """Cross-entropy of codes that are stored, or that the tokenizer makes of images while training."""

    result_name = "pipeline"

    def __init__(self, args: DnDArguments):
        environment = RunEnvironment(args)
        disable_progress_bar()  # of loading and saving weights
        set_seed(args.seed)
        codes = CodesDataset(args.codes_dir) if args.codes_dir else None
        with loading(args.vqvae or args.codes_dir):
            vae = RQVAE.from_pretrained(args.vqvae or args.codes_dir, subfolder=None if args.vqvae else "vqvae")
        self.vae = vae.to(environment.accelerator.device).eval().requires_grad_(False)
        if codes is not None:
            self.source, grid_size = codes, codes.shape[:2]
            train_set, self.validation_set = hold_out(
                codes, args.num_validation_images, args.seed, group_size=codes.crops_per_image
            )
        else:
            size = height_width("sample_size", vae.config.sample_size)
            check_stride(size, vae.code_stride)
            grid_size = (size[0] // vae.code_stride[0], size[1] // vae.code_stride[1])
            self.source, train_set, self.validation_set = load_training_images(args, size)
        self.class_names = self.source.class_names

        transformer = args.make_transformer(vae, grid_size, self.class_names)
        transformer.generation_config.temperature = args.temperature
        transformer.generation_config.guidance_scale = args.guidance_scale if transformer.config.has_null_class else 1.0
        SamplingSettings.resolve(transformer.config, transformer.generation_config)  # refuses what `generate` would
        if args.gradient_checkpointing:
            transformer.gradient_checkpointing_enable()
        transformer.set_attn_implementation(args.attn_implementation)
        if args.torch_compile:
            transformer.compile()
        paper_rate = ARCHITECTURES[args.architecture].learning_rate(environment.samples_per_step)
        learning_rate = args.learning_rate or paper_rate
        groups = weight_decay_groups(transformer, args.weight_decay)
        super().__init__(
            environment,
            transformer.train(),
            torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.95), fused=True),
            train_set,
            collate_codes if args.codes_dir else collate_images,
            tokens_per_sample=transformer.config.sequence_length,
            flops_per_sample=transformer_training_flops(transformer.config),
        )

    def facts(self) -> dict[str, Any]:
        source, has_codes = self.source, bool(self.args.codes_dir)
        data = {"codes": source.rows._fingerprint} if has_codes else {"digest_of_file_names": source.files_digest}
        tokenizer = {"tokenizer": fingerprint(self.vae), "tokenizer_config": model_settings(self.vae)}
        return super().facts() | {"class_names": self.class_names} | data | tokenizer

    def codes_of(self, batch: dict[str, Tensor]) -> Tensor:
        """`(batch, height, width, depth)`: those of the batch, or of its images."""
        if "codes" in batch:
            return batch["codes"]
        with torch.no_grad():
            return self.vae.encode(batch["pixel_values"]).codes

    def codes_and_targets_of(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """The codes that the model reads in training, and what it learns to predict, as arguments of `forward`."""
        if self.args.soft_code_temperature is None:
            codes = self.codes_of(batch)
            return codes, {"labels": codes}
        settings = (self.args.soft_code_temperature, self.args.stochastic_codes)
        codes, soft_targets = soft_codes(self.vae, batch["pixel_values"], *settings)
        return codes, {"soft_targets": soft_targets}

    def train_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        with self.accelerator.accumulate(self.wrapped_model):
            codes, targets = self.codes_and_targets_of(batch)
            output = self.wrapped_model(class_labels=batch["labels"], codes=codes, output_logits=False, **targets)
            self.accelerator.backward(output.loss)
            metrics = self.clip_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
        depth_losses = {f"loss_depth_{k}": loss for k, loss in enumerate(output.depth_losses, start=1)}
        return {"loss": output.loss, **depth_losses, **metrics}

    def validate(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        accelerator, num_samples = self.accelerator, len(self.validation_set)
        mine = Subset(self.validation_set, range(accelerator.process_index, num_samples, accelerator.num_processes))
        total = torch.zeros(model.config.code_depth, device=accelerator.device)
        for batch in DataLoader(mine, self.args.train_batch_size, collate_fn=self.collate):
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            codes = self.codes_of(batch)
            losses = model(batch["labels"], codes, labels=codes, output_logits=False).depth_losses
            total += losses * len(codes) / num_samples
        losses = accelerator.reduce(total).tolist()
        if accelerator.is_main_process:
            self.show(self.sample(model), round(self.args.num_samples**0.5), step)
        return {"loss": sum(losses) / len(losses)} | {f"loss_depth_{k}": v for k, v in enumerate(losses, start=1)}

    def sample(self, model: PreTrainedModel) -> list[Image.Image]:
        """The images of the sample grid: the classes in turn, always with the same seeds."""
        count, device = self.args.num_samples, self.accelerator.device
        labels = [i % len(self.class_names) for i in range(count)]
        generators = [torch.Generator(device).manual_seed(i) for i in range(count)]
        with self.accelerator.autocast():
            return self.make_pipeline(model)(labels, generator=generators).images

    def make_pipeline(self, model: PreTrainedModel) -> DnDPipeline:
        """The model with its tokenizer."""
        pipe = DnDPipeline(transformer=model, vqvae=self.vae)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def export(self, model: PreTrainedModel, folder: Path) -> None:
        self.make_pipeline(model).save_pretrained(folder)

    def summary(self) -> dict[str, str]:
        names = self.class_names
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return super().summary() | {"classes": f"{len(names):,}: {shown}"}

    def next_command(self) -> str:
        return shlex.join(["python", "examples/generate.py", "--model", self.args.output_dir, "--output", "grid.png"])


def main(args: DnDArguments) -> None:
    DnDTraining(args).train()


if __name__ == "__main__":
    run_script(main, DnDArguments)
