"""Command-line arguments that the training and extraction scripts share, and how they are read."""

import sys
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from ..data.images import ImageDataset, ImageTransform, TenCrop, load_image_dataset


Arguments = TypeVar("Arguments")

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
class ImageArguments:
    """Where the pictures come from."""

    dataset_name: str | None = HfArg(
        default=None,
        help="`words` (rendered while training), a data set on the Hub, or a folder of pictures or parquet files.",
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the data set on the Hub.")
    dataset_split: str = HfArg(default="train", help="Split of the data set.")
    image_column: str = HfArg(default="image", help="Column of the pictures.")
    label_column: str = HfArg(default="label", help="Column of the labels; a data set without it has one class.")
    num_train_images: int | None = HfArg(
        default=None, help="How many `words` to render (default 100,000); of other data sets, how many to use."
    )
    dataloader_num_workers: int = HfArg(default=2, help="Processes that prepare data, for each training process.")
    seed: int = HfArg(default=0, help="Of the weights, the order of the data, augmentation and dropout.")

    def load_images(self, transform: ImageTransform | TenCrop) -> ImageDataset:
        """The data set these arguments name; see [`load_image_dataset`] for the errors."""
        return load_image_dataset(
            self.dataset_name,
            transform,
            self.dataset_split,
            self.dataset_config_name,
            self.image_column,
            self.label_column,
            self.num_train_images,
            self.seed,
        )


@dataclass
class TrainingArguments(ImageArguments):
    """How a training run goes; the defaults that differ between scripts are set there."""

    output_dir: str = HfArg(default="output", help="Folder of the result, checkpoints, metrics and samples.")
    random_flip: bool = HfArg(default=False, help="Mirror half of the training pictures; not for text.")
    random_crop: bool = HfArg(default=False, help="Crop training pictures at random instead of at the center.")
    train_batch_size: int = HfArg(default=32, help="Samples a forward pass, for each process.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Forward passes a step of the optimizer.")
    max_train_steps: int = HfArg(default=100_000, help="Steps of the optimizer.")
    learning_rate: float | None = HfArg(default=None, help="Peak learning rate.")
    lr_scheduler: Literal["constant_with_warmup", "cosine", "linear"] = HfArg(
        default="constant_with_warmup", help="Learning rate after the warmup."
    )
    lr_warmup_steps: int = HfArg(default=500, help="Steps in which the learning rate rises from 0.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are scaled down to this norm.")
    ema_decay: float = HfArg(default=0.999, help="Decay of the averaged weights, which are what is saved.")
    mixed_precision: Literal["no", "bf16"] | None = HfArg(
        default=None, help="Default: what `accelerate launch` says, otherwise bf16 on GPUs that have it."
    )
    gradient_checkpointing: bool = HfArg(default=False, help="Compute activations twice to save memory.")
    logging_steps: int = HfArg(default=50, help="Steps between lines of metrics.jsonl.")
    validation_steps: int = HfArg(default=2000, help="Steps between validations and sample grids.")
    num_validation_images: int = HfArg(default=256, help="Pictures held out of training for validation.")
    checkpointing_steps: int = HfArg(default=2000, help="Steps between checkpoints.")
    checkpoints_total_limit: int = HfArg(default=2, help="Older checkpoints are deleted.")
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="A checkpoint folder, or `latest`: the newest in output_dir, if there is one."
    )
    report_to: list[str] = HfArg(default_factory=list, help="Further trackers, e.g. tensorboard wandb.")

    def __post_init__(self):
        for name in POSITIVE_OPTIONS:
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}.")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"--learning_rate must be positive, got {self.learning_rate}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay must lie in [0, 1), got {self.ema_decay}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must lie in [0, 2^31), got {self.seed}.")

    def train_transform(self, resolution: tuple[int, int]) -> ImageTransform:
        """The transform of training pictures, with the augmentation asked for."""
        return ImageTransform(resolution, "random" if self.random_crop else "center", self.random_flip)


def parse_arguments(arguments_class: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """Reads `argv` (default: the command line) into a dataclass; `--config file.yaml` gives defaults below the options.

    Leaves the program with a message where the dataclass raises ValueError, or the file names an unknown option.
    """
    parser = HfArgumentParser(arguments_class)
    parser.add_argument("--config", help="YAML file of these options; the command line overrides it.")
    argv = sys.argv[1:] if argv is None else argv
    given, _ = parser.parse_known_args(argv)
    if given.config:
        parser.set_defaults(**_read_options(given.config, arguments_class, parser))
    options = vars(parser.parse_args(argv))
    del options["config"]
    try:
        return arguments_class(**options)
    except ValueError as error:
        parser.error(str(error))


def _read_options(path: str, arguments_class: type, parser: HfArgumentParser) -> dict[str, Any]:
    with open(path) as file:
        options = yaml.safe_load(file)
    unknown = set(options) - {field.name for field in fields(arguments_class)}
    if unknown:
        parser.error(f"{path} has unknown options: {', '.join(sorted(unknown))}")
    return options
