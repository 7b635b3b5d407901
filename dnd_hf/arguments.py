"""Command-line options that the scripts share, and how a script reads them."""

import copy
import errno
import logging
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import psutil
import yaml
from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg, string_to_bool

from .data.images import ImageDataset, ImageStream, ImageTransform, TenCrop, WithMirrorImage
from .data.rgb import parse_background
from .data.sources import load_image_dataset
from .messages import BesideProgressBars, close_progress_bars


Arguments = TypeVar("Arguments")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

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


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Each option by one of its names and the kind of its value, with its default where there is one to tell."""

    def _format_action_invocation(self, action: Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        return super()._format_action_invocation(shown)

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        kinds: dict[Any, str] = {string_to_bool: "BOOL", int: "INT", float: "FLOAT"}
        return kinds.get(action.type, "TEXT")

    def _get_help_string(self, action: Action) -> str | None:
        if action.option_strings[0] == f"--no_{action.dest}":
            return f"The same as --{action.dest} false."
        untold = action.default is False or action.default in (None, [], SUPPRESS)
        return action.help if untold else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Groups the options by the dataclass that declares them; the start of its docstring is the heading."""

    def __init__(self, arguments_class: type):
        self.groups: dict[str, Any] = {}
        about = getattr(sys.modules.get(arguments_class.__module__), "__doc__", None) or ""
        about, usage = about.split("\n\n")[0], "%(prog)s [--option value ...]"
        super().__init__(
            arguments_class,
            usage=usage,
            description=about,
            formatter_class=partial(_HelpFormatter, max_help_position=34),
        )
        for action in self._actions:
            action.help = name_options(action.help or "", arguments_class)

    def _parse_dataclass_field(self, parser: "_Parser", field: Field) -> None:
        bases = reversed(self.dataclass_types[0].__mro__)
        declaring = next(base for base in bases if field.name in vars(base).get("__annotations__", ()))
        heading = re.split(r"[.,:;]", declaring.__doc__)[0]
        if heading not in self.groups:
            self.groups[heading] = self.add_argument_group(heading)
        super()._parse_dataclass_field(self.groups[heading], field)

    def error(self, message: str) -> NoReturn:
        _leave(f"{message} (--help lists the options)", 2)


def run_script(main: Callable[[Arguments], None], arguments_class: type[Arguments]) -> None:
    """Runs a script with the options of its command line, and ends it as a command ends.

    What the user can mend (a bad value, a missing file or package) is one line and exit code 2; a run that had to stop
    (a RuntimeError of this project, a full disk) one line and exit code 1. Other errors keep their traceback, and with
    `--debug` all do. Of several processes the main one prints; another one only where the main one keeps running.
    """
    # diffusers passes huggingface_hub an argument that this one no longer knows.
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
    logging.basicConfig(format="%(message)s", handlers=[BesideProgressBars()])
    if "--debug" in sys.argv:
        main(parse_arguments(arguments_class))
        return
    try:
        main(parse_arguments(arguments_class))
    except KeyboardInterrupt:
        _leave("interrupted", 128 + signal.SIGINT)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        message, is_ours = _origin(error)
        if isinstance(error, RuntimeError) and not is_ours:
            raise
        failed = isinstance(error, RuntimeError) or getattr(error, "errno", None) in FULL_DISK
        _leave(name_options(message, arguments_class), 1 if failed else 2)


def _leave(message: str, code: int) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":
        # The launcher ends this process as soon as the main one has ended, with the same message.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
        message = f"process {os.environ['RANK']}: {message}"
    close_progress_bars()
    print(f"{Path(sys.argv[0]).name}: error: {message}{_launcher_note()}", file=sys.stderr)
    sys.exit(code)


def _launcher_note() -> str:
    """Whose traceback follows, where `accelerate launch` is going to show one."""
    parent = psutil.Process().parent() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
    command = parent.cmdline() if parent else []
    if not any("accelerate" in word for word in command):
        return ""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return " (The traceback below is that of accelerate.)"
    told = " (The traceback below is that of accelerate; `accelerate launch --quiet` leaves it out.)"
    return "" if {"--quiet", "-q"} & set(command) else told


def _origin(error: Exception) -> tuple[str, bool]:
    """The message of an error, and whether this project's own code raised it."""
    message = str(error)
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    if "Original Traceback" in message:  # of a worker of a DataLoader
        file = re.findall(r'File "([^"]+)"', message)[-1]
        message = message.strip().rpartition("\n")[2].partition(": ")[2]
    folders = (Path(__file__).parent, Path(sys.argv[0]).resolve().parent)
    is_ours = any(folder in Path(file).resolve().parents for folder in folders)
    return message if is_ours else f"{' '.join(message.split())} (--debug shows where)", is_ours


def name_options(message: str, arguments_class: type) -> str:
    """A message with the library's `names` of arguments as the `--names` of the script's options."""
    names = {field.name for field in fields(arguments_class)}
    return re.sub(r"`(\w+)`", lambda match: f"--{match[1]}" if match[1] in names else match[0], message)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Says of a model that cannot be loaded where it was looked for.

    Raises:
        FileNotFoundError: there is no folder `name`, and no repository of this name on the Hub that can be read.
    """
    try:
        yield
    except (OSError, HFValidationError) as error:
        if Path(name).exists() or getattr(error, "errno", None) in FULL_DISK:
            raise
        offline = " The Hub is not asked, since HF_HUB_OFFLINE is set." if HF_HUB_OFFLINE else ""
        raise FileNotFoundError(
            f"there is no folder {name}, and no repository {name} on the Hub that can be read.{offline}"
        ) from error


def parse_arguments(arguments_class: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """Reads `argv` (default: the command line) into a dataclass; `--config file.yaml` gives defaults below the options.

    Leaves the program with a message where an option is unknown, or the dataclass raises ValueError.
    """
    parser = _Parser(arguments_class)
    parser.add_argument("--config", help="YAML file of these options; the command line overrides it.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of every error.")
    argv = sys.argv[1:] if argv is None else argv
    given, _ = parser.parse_known_args(argv)
    if given.config:
        parser.set_defaults(**_read_options(given.config, arguments_class, parser))
    options = vars(parser.parse_args(argv))
    del options["config"], options["debug"]
    try:
        return arguments_class(**options)
    except ValueError as error:
        parser.error(name_options(str(error), arguments_class))


def _read_options(path: str, arguments_class: type, parser: HfArgumentParser) -> dict[str, Any]:
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {' '.join(str(error).split())}")
    if not isinstance(options, dict):
        parser.error(f"--config {path}: a line for each option is needed, `name: value`.")
    unknown = set(map(str, options)) - {field.name for field in fields(arguments_class)}
    if unknown:
        parser.error(f"{path} has unknown options: {', '.join(sorted(unknown))}")
    return options
