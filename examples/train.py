"""Trains a DnD-Transformer on codes made by extract_codes.py, or straight on pictures with a tokenizer.

python examples/train.py --codes_dir codes --size B --output_dir dnd-b
python examples/train.py --dataset_name words --vqvae rqvae-words --hidden_size 256 --num_hidden_layers 6 \
    --num_attention_heads 4 --output_dir dnd-words

The result, `output_dir`, is a whole pipeline: `DnDPipeline.from_pretrained(output_dir)`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE, DnDConfig, DnDForImageGeneration, DnDPipeline
from dnd_hf.data.codes import CodesDataset, collate_codes
from dnd_hf.data.images import as_size, check_stride, collate_images
from dnd_hf.training.arguments import TrainingArguments, parse_arguments
from dnd_hf.training.data_order import hold_out
from dnd_hf.training.optimization import weight_decay_groups
from dnd_hf.training.run import TrainingRun
from dnd_hf.training.throughput import transformer_training_flops


SHAPE_OPTIONS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "prediction_layers",
    "depth_mode",
    "tie_prediction_heads",
    "class_dropout_prob",
    "embedding_dropout",
    "residual_dropout",
    "mlp_dropout",
    "drop_path_rate",
    "initializer_range",
)


@dataclass
class DnDArguments(TrainingArguments):
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    codes_dir: str | None = HfArg(default=None, help="Folder of extract_codes.py; otherwise give --dataset_name.")
    vqvae: str | None = HfArg(default=None, help="The tokenizer for --dataset_name: a folder or a Hub id.")
    pretrained_transformer: str | None = HfArg(
        default=None, help="Fine-tune this transformer (folder or Hub id); its shape replaces the options of the model."
    )
    size: Literal["B", "L", "XL", "XXL", "XXXL"] = HfArg(
        default="B", help="Size of the paper; each of the following options replaces one of its numbers."
    )
    hidden_size: int | None = HfArg(default=None, help="Width.")
    num_hidden_layers: int | None = HfArg(default=None, help="Number of LLaMA blocks.")
    num_attention_heads: int | None = HfArg(default=None, help="Heads, each a multiple of 4 wide.")
    num_key_value_heads: int | None = HfArg(default=None, help="Fewer than the heads for grouped-query attention.")
    intermediate_size: int | None = HfArg(default=None, help="Width of the SwiGLU.")
    prediction_layers: list[int] | None = HfArg(default=None, help="0-based layer of each depth's head.")
    depth_mode: Literal["dnd", "vertical", "parallel"] = HfArg(default="dnd", help="Table 3 of the paper.")
    tie_prediction_heads: bool = HfArg(default=False, help="One output matrix for all depths.")
    class_dropout_prob: float = HfArg(default=0.1, help="Share of samples without class; 0: no guidance.")
    embedding_dropout: float = HfArg(default=0.1, help="Dropout of the input tokens.")
    residual_dropout: float = HfArg(default=0.1, help="Dropout of the attention output.")
    mlp_dropout: float = HfArg(default=0.1, help="Dropout of the MLP output.")
    drop_path_rate: float = HfArg(default=0.0, help="Stochastic depth of the last layer.")
    initializer_range: float = HfArg(default=0.02, help="Standard deviation of the initial weights.")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] = HfArg(
        default="sdpa", help="How attention is computed while training; `eager` is fast for a compiled small grid."
    )

    learning_rate: float | None = HfArg(
        default=None, help="Peak learning rate; default: the paper's 1e-4 per 256 samples of one optimizer step."
    )
    weight_decay: float = HfArg(default=0.05, help="Of matrices; biases and gains do not decay.")
    guidance_scale: float = HfArg(default=2.0, help="Of the sample grids, and the default of the saved pipeline.")
    temperature: float = HfArg(default=1.0, help="Likewise; the paper's is 0.1 for pictures of text.")
    num_samples: int = HfArg(default=16, help="Pictures of a sample grid; their seeds are always the same.")

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

    def make_transformer(self, vae: RQVAE, grid_size: tuple[int, int], class_names: list[str]) -> DnDForImageGeneration:
        """The transformer to train: new, or `pretrained_transformer`."""
        if self.pretrained_transformer:
            model = DnDForImageGeneration.from_pretrained(self.pretrained_transformer, dtype=torch.float32)
            if tuple(model.config.grid_size) != grid_size or model.config.num_classes != len(class_names):
                raise ValueError(
                    f"the data has a grid of {grid_size} and {len(class_names)} classes; {self.pretrained_transformer}"
                    f" was made for {tuple(model.config.grid_size)} and {model.config.num_classes}."
                )
            return model
        options = {name: getattr(self, name) for name in SHAPE_OPTIONS if getattr(self, name) is not None}
        config = DnDConfig.from_size(
            self.size,
            vocab_size=vae.config.num_vq_embeddings,
            grid_size=grid_size,
            code_depth=vae.config.code_depth,
            num_classes=len(class_names),
            id2label=dict(enumerate(class_names)),
            **options,
        )
        if config.prediction_layers[-1] != config.num_hidden_layers - 1:
            raise ValueError("the last of --prediction_layers must be the last layer; layers above it learn nothing.")
        return DnDForImageGeneration(config)


def main(args: DnDArguments) -> None:
    run = TrainingRun(args)
    accelerator = run.accelerator
    set_seed(args.seed)
    dataset = CodesDataset(args.codes_dir) if args.codes_dir else None
    vae = RQVAE.from_pretrained(args.vqvae or args.codes_dir, subfolder=None if args.vqvae else "vqvae")
    vae.to(accelerator.device).eval().requires_grad_(False)
    if dataset is not None:
        collate = collate_codes
        grid_size, crops = dataset.shape[:2], dataset.crops_per_image
        train_set, validation_set = hold_out(dataset, args.num_validation_images, args.seed, group_size=crops)
    else:
        size = as_size(vae.config.sample_size)
        check_stride(size, vae.code_stride)
        dataset, train_set, validation_set = args.load_training_images(size)
        collate = collate_images
        grid_size = (size[0] // vae.code_stride[0], size[1] // vae.code_stride[1])

    transformer = args.make_transformer(vae, grid_size, dataset.class_names)
    transformer.generation_config.temperature = args.temperature
    transformer.generation_config.guidance_scale = args.guidance_scale if transformer.config.has_null_class else 1.0
    if args.gradient_checkpointing:
        transformer.gradient_checkpointing_enable()
    transformer.set_attn_implementation(args.attn_implementation)
    if args.torch_compile:
        transformer.compile()
    transformer.train()
    learning_rate = args.learning_rate or 1e-4 * run.samples_per_step / 256
    groups = weight_decay_groups(transformer, args.weight_decay)
    model, optimizer = run.prepare(
        transformer,
        torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.95), fused=True),
        tokens_per_sample=transformer.config.sequence_length,
        flops_per_sample=transformer_training_flops(transformer.config),
    )
    run.resume()

    def make_pipeline(transformer: DnDForImageGeneration) -> DnDPipeline:
        pipe = DnDPipeline(transformer=transformer, vqvae=vae)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def export(transformer: DnDForImageGeneration, folder: Path) -> None:
        make_pipeline(transformer).save_pretrained(folder)

    def codes_of(batch: dict[str, Tensor]) -> Tensor:
        if "codes" in batch:
            return batch["codes"]
        with torch.no_grad():
            return vae.encode(batch["pixel_values"]).codes

    def train_step(batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        with accelerator.accumulate(model):
            codes = codes_of(batch)
            output = model(class_labels=batch["labels"], codes=codes, labels=codes, output_logits=False)
            accelerator.backward(output.loss)
            metrics = run.clip_gradients()
            optimizer.step()
            optimizer.zero_grad()
        depth_losses = {f"loss_depth_{k}": loss for k, loss in enumerate(output.depth_losses, start=1)}
        return {"loss": output.loss, **depth_losses, **metrics}

    def validate(transformer: DnDForImageGeneration, step: int) -> dict[str, float]:
        mine = Subset(validation_set, range(accelerator.process_index, len(validation_set), accelerator.num_processes))
        total = torch.zeros(transformer.config.code_depth, device=accelerator.device)
        for batch in DataLoader(mine, args.train_batch_size, collate_fn=collate):
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            codes = codes_of(batch)
            losses = transformer(batch["labels"], codes, labels=codes, output_logits=False).depth_losses
            total += losses * len(codes) / len(validation_set)
        losses = accelerator.reduce(total).tolist()
        if accelerator.is_main_process:
            labels = [i % len(dataset.class_names) for i in range(args.num_samples)]
            generators = [torch.Generator(accelerator.device).manual_seed(i) for i in range(args.num_samples)]
            images = make_pipeline(transformer)(labels, generator=generators).images
            run.show(images, round(args.num_samples**0.5), step)
        return {"loss": sum(losses) / len(losses)} | {f"loss_depth_{k}": v for k, v in enumerate(losses, start=1)}

    run.loop(train_set, collate, train_step, validate, export, "pipeline")


if __name__ == "__main__":
    main(parse_arguments(DnDArguments))
