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

python examples/train.py --architecture rq_transformer --dataset_name words --vqvae rqvae-words --caption_column text \
    --text_tokenizer tokenizer --output_dir text-to-words

The result, `output_dir`, is a whole pipeline: `DnDPipeline.from_pretrained(output_dir)`.
"""

import os


if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("Loading the libraries ...", flush=True)

import shlex
from collections.abc import Callable
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
from dnd_hf.arguments import RunArguments, refuse_other_values
from dnd_hf.command_line import loading, run_script
from dnd_hf.data.codes import CodesDataset, collate_codes
from dnd_hf.data.images import check_stride, collate_images
from dnd_hf.files import changes_of, write_text
from dnd_hf.generation.settings import SamplingSettings
from dnd_hf.models.modeling_dnd import DnDOutput
from dnd_hf.models.modeling_rq_transformer import RQTransformerOutput
from dnd_hf.ops.number_checks import height_width
from dnd_hf.training.architectures import ARCHITECTURES
from dnd_hf.training.captions import CollateCaptions, PromptTokenizer
from dnd_hf.training.data_order import SizedDataset, hold_out
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
    caption_column: str | None = HfArg(
        default=None, help="With --dataset_name: column of texts that describe the images, for --text_tokenizer."
    )
    text_tokenizer: str | None = HfArg(
        default=None,
        help="Learn to make images from their captions, in the place of labels: a tokenizer of texts (folder or Hub"
        " id), which is saved with the pipeline; for --architecture rq_transformer.",
    )
    prompt_length: int | None = HfArg(
        default=None, help="Tokens that captions are padded or cut to; default: the tokenizer's model_max_length."
    )
    pretrained_transformer: str | None = HfArg(
        default=None,
        help="Fine-tune this transformer (folder or Hub id); options of the model may only repeat its own.",
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
        if self.text_tokenizer is not None and self.architecture != "rq_transformer":
            raise ValueError("--text_tokenizer goes with --architecture rq_transformer; DnD models have class labels.")
        if self.text_tokenizer is None and (self.caption_column is not None or self.prompt_length is not None):
            raise ValueError("--caption_column and --prompt_length go with --text_tokenizer.")
        if self.text_tokenizer is not None and (self.caption_column is None) == (self.codes_dir is None):
            raise ValueError("--text_tokenizer needs --caption_column, or a --codes_dir, which has its own captions.")
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
        self.given = {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}
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

    def make_transformer(self, vae: RQVAE, **data: Any) -> PreTrainedModel:
        """The transformer to train: new, or `pretrained_transformer`; `data`: what its configuration has to say."""
        architecture = ARCHITECTURES[self.architecture]
        if self.pretrained_transformer:
            with loading(self.pretrained_transformer):
                found = AutoConfig.from_pretrained(self.pretrained_transformer).model_type
            if found != self.architecture:
                raise ValueError(f"{self.pretrained_transformer} is of --architecture {found}.")
            model = architecture.model_class.from_pretrained(self.pretrained_transformer, dtype=torch.float32)
            refuse_other_values(self.given, model.config.to_dict(), self.pretrained_transformer)
            expected = {name: value for name, value in data.items() if name != "id2label"}
            found = {name: getattr(model.config, name, None) for name in expected}
            if different := changes_of(found, expected):
                raise ValueError(f"{self.pretrained_transformer} was made for other data: {'; '.join(different)} here.")
            return model
        options = {name: getattr(self, name) for name in architecture.options}
        return architecture.make(self.size, options, vae, **data)


class DnDTraining(TrainingRun):
    """Cross-entropy of codes that are stored, or that the tokenizer makes of images while training."""

    result_name = "pipeline"

    def __init__(self, args: DnDArguments):
        environment = RunEnvironment(args)
        disable_progress_bar()  # of loading and saving weights
        set_seed(args.seed)
        with loading(args.vqvae or args.codes_dir):
            vae = RQVAE.from_pretrained(args.vqvae or args.codes_dir, subfolder=None if args.vqvae else "vqvae")
        self.vae = vae.to(environment.accelerator.device).eval().requires_grad_(False)
        train_set, self.validation_set, grid_size = self._load_data(args)
        collate: Callable[[list[dict]], dict[str, Any]] = collate_codes if args.codes_dir else collate_images
        data = dict(num_classes=len(self.class_names), id2label=dict(enumerate(self.class_names)))
        self.prompts = None
        if args.text_tokenizer is not None:
            with loading(args.text_tokenizer):
                self.prompts = PromptTokenizer.from_pretrained(args.text_tokenizer, args.prompt_length)
            collate = CollateCaptions(collate, self.prompts)
            data = dict(prompt_length=self.prompts.prompt_length, prompt_vocab_size=self.prompts.vocab_size)

        transformer = args.make_transformer(vae, grid_size=grid_size, **data)
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
            collate,
            tokens_per_sample=transformer.config.sequence_length,
            flops_per_sample=transformer_training_flops(transformer.config),
        )

    def _load_data(self, args: DnDArguments) -> tuple[SizedDataset, SizedDataset, tuple[int, int]]:
        """The samples to train on, those held out, the (height, width) of their codes; sets `source`, `class_names`."""
        vae = self.vae
        if args.codes_dir:
            codes = CodesDataset(args.codes_dir)
            if args.text_tokenizer is not None and not codes.has_captions:
                raise ValueError(f"{args.codes_dir} has no captions: extract its codes again, with --caption_column.")
            self.source, self.class_names, grid_size = codes, codes.class_names, codes.shape[:2]
            return *hold_out(codes, args.num_validation_images, args.seed, codes.crops_per_image), grid_size
        size = height_width("sample_size", vae.config.sample_size)
        check_stride(size, vae.code_stride)
        self.source, train_set, validation_set = load_training_images(args, size, args.caption_column)
        self.class_names = self.source.class_names
        return train_set, validation_set, (size[0] // vae.code_stride[0], size[1] // vae.code_stride[1])

    def facts(self) -> dict[str, Any]:
        source, has_codes = self.source, bool(self.args.codes_dir)
        data = {"codes": source.rows._fingerprint} if has_codes else {"digest_of_file_names": source.files_digest}
        tokenizer = {"tokenizer": fingerprint(self.vae), "tokenizer_config": model_settings(self.vae)}
        names: dict[str, Any] = {"class_names": self.class_names}
        if self.prompts is not None:
            names = {"text_tokens": self.prompts.fingerprint}
        return super().facts() | names | data | tokenizer

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
        return dict(zip(self._loss_names(), self._losses(output))) | metrics

    def _loss_names(self) -> list[str]:
        depths = [f"loss_depth_{k}" for k in range(1, self.vae.config.code_depth + 1)]
        return ["loss", *depths] + ([] if self.prompts is None else ["prompt_loss"])

    def _losses(self, output: DnDOutput | RQTransformerOutput) -> list[Tensor]:
        return [output.loss, *output.depth_losses] + ([] if self.prompts is None else [output.prompt_loss])

    def validate(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        accelerator, num_samples = self.accelerator, len(self.validation_set)
        mine = Subset(self.validation_set, range(accelerator.process_index, num_samples, accelerator.num_processes))
        total = torch.zeros(len(self._loss_names()), device=accelerator.device)
        for batch in DataLoader(mine, self.args.train_batch_size, collate_fn=self.collate):
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            codes = self.codes_of(batch)
            output = model(batch["labels"], codes, labels=codes, output_logits=False)
            total += torch.stack(self._losses(output)) * len(codes) / num_samples
        losses = accelerator.reduce(total).tolist()
        if accelerator.is_main_process:
            self.show(self.sample(model), round(self.args.num_samples**0.5), step)
            if self.prompts is not None:
                shown = "".join(f"{caption}\n" for caption in self.captions(self.args.num_samples))
                write_text(self.output_dir / "samples" / "captions.txt", shown)
        return dict(zip(self._loss_names(), losses))

    def sample(self, model: PreTrainedModel) -> list[Image.Image]:
        """The images of the sample grid: the classes in turn, or of captions held out, always with the same seeds."""
        count, device = self.args.num_samples, self.accelerator.device
        generators = [torch.Generator(device).manual_seed(i) for i in range(count)]
        conditions: dict[str, list] = {"class_labels": [i % len(self.class_names) for i in range(count)]}
        if self.prompts is not None:
            conditions = {"prompt": self.captions(count)}
        with self.accelerator.autocast():
            return self.make_pipeline(model)(**conditions, generator=generators).images

    def captions(self, count: int) -> list[str]:
        """The first captions held out, each on one line, again and again where there are fewer than `count`."""
        held_out = [self.validation_set[i]["caption"] for i in range(min(count, len(self.validation_set)))]
        return [" ".join(held_out[i % len(held_out)].split()) for i in range(count)]

    def make_pipeline(self, model: PreTrainedModel) -> DnDPipeline:
        """The model with its tokenizers."""
        text_tokenizer = None if self.prompts is None else self.prompts.tokenizer
        pipe = DnDPipeline(transformer=model, vqvae=self.vae, tokenizer=text_tokenizer)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def export(self, model: PreTrainedModel, folder: Path) -> None:
        self.make_pipeline(model).save_pretrained(folder)

    def summary(self) -> dict[str, str]:
        if self.prompts is not None:
            length, vocab_size = self.prompts.prompt_length, self.prompts.vocab_size
            return super().summary() | {"captions": f"{length} tokens of {vocab_size:,}: {self.captions(1)[0]!r}, ..."}
        names = self.class_names
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return super().summary() | {"classes": f"{len(names):,}: {shown}"}

    def next_command(self) -> str:
        prompts = [] if self.prompts is None else ["--prompts", *self.captions(1)]
        options = ["--model", self.args.output_dir, *prompts, "--output", "grid.png"]
        return shlex.join(["python", "examples/generate.py", *options])


def main(args: DnDArguments) -> None:
    DnDTraining(args).train()


if __name__ == "__main__":
    run_script(main, DnDArguments)
