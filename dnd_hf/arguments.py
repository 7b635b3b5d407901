"""Command-line options that the scripts share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.hf_argparser import HfArg

from .data.images import ImageDataset, ImageStream, ImageTransform, TenCrop, WithMirrorImage
from .data.rgb import parse_background
from .data.sources import load_image_dataset


POSITIVE_OPTIONS = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "max_grad_norm",
    "logging_steps",
    "validation_steps",
    "num_validation_images",
    "checkpointing_steps",
    "checkpoints_total_limit",
)


@dataclass
class SamplingArguments:
    """How codes are drawn, see `DnDForImageGeneration.generate`."""

    guidance_scale: float | None = HfArg(default=None, help="Default of this and the next five: the checkpoint's own.")
    guidance_schedule: Literal["constant", "linear", "power-cosine"] | None = HfArg(
        default=None, help="How the guidance grows from the first position of an image to the last."
    )
    guidance_power: float | None = HfArg(default=None, help="Of power-cosine; the greater, the later it sets in.")
    temperature: float | None = HfArg(default=None, help="The logits are divided by it.")
    top_k: int | None = HfArg(default=None, help="Only the k most likely codes may be drawn; 0: all.")
    top_p: float | None = HfArg(default=None, help="Only the likeliest codes of this total probability may be drawn.")

    @property
    def sampling(self) -> dict[str, Any]:
        """Those that are given, to be passed to a pipeline."""
        options = {field.name: getattr(self, field.name) for field in fields(SamplingArguments)}
        return {name: value for name, value in options.items() if value is not None}


def refuse_other_values(given: Mapping[str, Any], config: Mapping[str, Any], model: str) -> None:
    """Raises ValueError where options say something else than the configuration of a model that is trained further."""
    different = [
        f"{name} {config.get(name)}, not {value}"
        for name, value in given.items()
        if _as_json(config.get(name)) != _as_json(value)
    ]
    if different:
        raise ValueError(f"{model} has {', '.join(different)}: leave these options out, they are for a new model.")


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass
class ImageArguments:
    """Where the images come from."""

    dataset_name: str | None = HfArg(
        default=None,
        help="`words` (rendered while training), a data set on the Hub, a folder of images or parquet files, one"
        " parquet file, or a folder written by save_to_disk.",
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the data set on the Hub.")
    dataset_split: str = HfArg(default="train", help="Split of the data set.")
    image_column: str = HfArg(default="image", help="Column of the images.")
    label_column: str = HfArg(
        default="label",
        help='Column of the labels, integers or strings; "" for one class, like a data set without "label".',
    )
    num_train_images: int | None = HfArg(
        default=None, help="How many `words` to render (default 100,000); of other data sets, how many to use."
    )
    streaming: bool = HfArg(
        default=False, help="Read the data set as it arrives instead of downloading it whole; only to extract codes."
    )
    max_broken_share: float = HfArg(
        default=0.01,
        help="Images that cannot be decoded are reported and left out; with more than this share, the run stops.",
    )
    crop_range: float = HfArg(
        default=1.0, help="Images first cover this many times their size, then are cropped; the paper's is 1.1."
    )
    background: str = HfArg(
        default="white", help="What transparent images are laid on: white, black or #RRGGBB (in quotes)."
    )
    dataloader_num_workers: int = HfArg(default=2, help="Processes that prepare data, for each training process.")
    seed: int = HfArg(default=0, help="Of the weights, the order of the data, augmentation and dropout.")

    def check_images(self, streamable: bool = False) -> None:
        """Raises ValueError for options outside their range, and for `--streaming` unless `streamable`."""
        if self.streaming and not streamable:
            raise ValueError(
                "--streaming is not for training, whose samples come in random order: run extract_codes.py with"
                " --streaming, then train on its codes."
            )
        if self.streaming and self.num_train_images is not None:
            raise ValueError("--num_train_images cannot be drawn from --streaming data.")
        if self.num_train_images is not None and self.num_train_images < 1:
            raise ValueError(f"--num_train_images must be positive, got {self.num_train_images}.")
        if not 0 <= self.max_broken_share <= 1:
            raise ValueError(f"--max_broken_share must lie in [0, 1], got {self.max_broken_share}.")
        if self.crop_range is not None and self.crop_range < 1:
            raise ValueError(f"--crop_range must be at least 1, got {self.crop_range}.")
        parse_background(self.background)
        if self.dataloader_num_workers < 0:
            raise ValueError(f"--dataloader_num_workers must not be negative, got {self.dataloader_num_workers}.")

    def load_images(
        self, transform: ImageTransform | WithMirrorImage | TenCrop, caption_column: str | None = None
    ) -> ImageDataset | ImageStream:
        """The data set these arguments name, which is described on the console; see [`load_image_dataset`]."""
        if self.dataset_name is None:
            raise ValueError("--dataset_name is needed: `words`, a data set on the Hub, or a folder.")
        dataset = load_image_dataset(
            self.dataset_name,
            transform,
            self.dataset_split,
            self.dataset_config_name,
            self.image_column,
            self.label_column or None,
            self.num_train_images,
            self.seed,
            self.streaming,
            caption_column,
        )
        if PartialState().is_main_process:
            print(f"{self.dataset_name}: {dataset.description}")
        return dataset


@dataclass
class OptimizationArguments:
    """How the weights are trained."""

    max_train_steps: int = HfArg(default=100_000, help="Steps of the optimizer.")
    num_train_epochs: float | None = HfArg(
        default=None, help="Passes over the training data, in the place of --max_train_steps."
    )
    train_batch_size: int = HfArg(default=32, help="Samples a forward pass, for each process.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Forward passes a step of the optimizer.")
    learning_rate: float | None = HfArg(default=None, help="Peak learning rate.")
    lr_scheduler: Literal["constant_with_warmup", "cosine", "linear"] = HfArg(
        default="constant_with_warmup", help="Learning rate after the warmup."
    )
    lr_warmup_steps: int = HfArg(default=500, help="Steps in which the learning rate rises from 0.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are scaled down to this norm.")
    ema_decay: float = HfArg(default=0.999, help="Decay of the averaged weights, which are what is saved.")


@dataclass
class SpeedArguments:
    """Speed and memory of training."""

    mixed_precision: Literal["no", "bf16"] | None = HfArg(
        default=None, help="Default: what `accelerate launch` says, otherwise bf16 on GPUs that have it."
    )
    gradient_checkpointing: bool = HfArg(default=False, help="Compute activations twice to save memory.")
    torch_compile: bool = HfArg(
        default=False, help="Compile the training step with torch.compile: a minute at the start, faster from then on."
    )


@dataclass
class OutputArguments:
    """What a run writes, and when."""

    output_dir: str = HfArg(default="output", help="Folder of the result, checkpoints, metrics and samples.")
    logging_steps: int = HfArg(default=50, help="Steps between lines of metrics.jsonl.")
    validation_steps: int = HfArg(default=2000, help="Steps between validations and sample grids.")
    num_validation_images: int = HfArg(default=256, help="Images held out of training for validation.")
    checkpointing_steps: int = HfArg(default=2000, help="Steps between checkpoints.")
    checkpoints_total_limit: int = HfArg(default=2, help="Older checkpoints are deleted.")
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="A checkpoint folder, or `latest`: the newest in output_dir, if there is one."
    )
    report_to: list[str] = HfArg(
        default_factory=list, help="Trackers beside metrics.jsonl: tensorboard, trackio, wandb, ...; none: no others."
    )


@dataclass
class HubArguments:
    """Upload of the result to the Hub."""

    push_to_hub: bool = HfArg(
        default=False, help="Upload the result with its model card; the token is that of `hf auth login` or HF_TOKEN."
    )
    hub_model_id: str | None = HfArg(
        default=None, help="Repository, `name` or `organisation/name`; default: the name of output_dir."
    )
    hub_private: bool = HfArg(default=False, help="If the repository is new: private.")
    hub_license: str | None = HfArg(
        default=None, help="Licence of the weights, for the model card, as the Hub writes it: apache-2.0, mit, ..."
    )


@dataclass
class RunArguments(HubArguments, OutputArguments, SpeedArguments, OptimizationArguments, ImageArguments):
    """Augmentation, and with the groups above all options of a training run; scripts set other defaults."""

    random_flip: bool = HfArg(default=False, help="Mirror half of the training images; not for text.")
    random_crop: bool = HfArg(default=False, help="Crop training images at random instead of at the center.")

    def __post_init__(self):
        self.check_images()
        for name in POSITIVE_OPTIONS:
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}.")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"--learning_rate must be positive, got {self.learning_rate}.")
        if self.num_train_epochs is not None and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"--num_train_epochs must be positive, got {self.num_train_epochs}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay must lie in [0, 1), got {self.ema_decay}.")
        self.report_to = [name for name in self.report_to if name != "none"]
        missing = set(self.report_to) - {str(tracker) for tracker in get_available_trackers()}
        if missing:
            raise ValueError(f"--report_to {', '.join(sorted(missing))}: no such tracker, or it is not installed.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must lie in [0, 2^31), got {self.seed}.")
        if self.push_to_hub or self.hub_model_id is not None:
            try:
                validate_repo_id(self.hub_name)
            except HFValidationError as error:
                raise ValueError(f"--hub_model_id: {error}") from error

    @property
    def hub_name(self) -> str:
        """What the repository of the result is called, with or without its owner."""
        return self.hub_model_id or Path(self.output_dir).resolve().name
