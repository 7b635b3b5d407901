"""Publishing a training run: its model card, and its folder as a repository on the Hub."""

import platform
import re
import shlex
import sys
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import ModelCard, ModelCardData, auth_check, create_repo, get_token, upload_folder
from transformers import AutoConfig

from .. import __version__
from ..arguments import RunArguments
from ..figures import markdown_table
from ..files import read_json, write_text
from ..pipelines.model_cards import pipeline_card, tokenizer_card, training_sections
from .metrics import read_metrics
from .settings import public


NOT_UPLOADED = "checkpoint-*"
LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "datasets")
PIPELINE_SAMPLES = "Samples of the classes in turn; their seeds are always the same."
PROMPT_SAMPLES = "Samples of captions held out of training (samples/captions.txt); their seeds are always the same."
TOKENIZER_SAMPLES = "A row for each image: the original, then what its first 1, 2, ... codes decode to."


def open_repository(args: RunArguments) -> str | None:
    """Creates the repository that `push_to_hub` asks for, or finds it, and makes sure that it can be written to.

    Returns:
        Its id, `organisation/name`; `None` without `push_to_hub`.

    Raises:
        ValueError: no token, no such right, an unknown licence, no connection; nothing has been created then.
    """
    if not args.push_to_hub:
        return None
    try:
        if get_token() is None:
            raise ValueError("no token, give one with `hf auth login` or the environment variable HF_TOKEN.")
        ModelCard(f"---\n{ModelCardData(license=args.hub_license)}\n---\n").validate()
        repo_id = create_repo(args.hub_name, private=args.hub_private or None, exist_ok=True).repo_id
        auth_check(repo_id, write=True)
    except Exception as error:  # also those of the HTTP library
        raise ValueError(f"`push_to_hub` cannot write to {args.hub_name!r}: {error}") from error
    return repo_id


def write_model_card(args: RunArguments, repo_id: str | None, accelerator: Accelerator, num_train_samples: int) -> None:
    """Writes `README.md` of a finished run into its folder: how to use it, data, settings, metrics, samples, licence.

    Args:
        args: of the run; those that differ from their defaults are listed, local folders by their last name.
        repo_id: where it will be on the Hub; `None`: what `args` would call it.
        accelerator: what it was trained with.
        num_train_samples: length of the data set.
    """
    folder, name = Path(args.output_dir), repo_id or args.hub_name
    is_pipeline = (folder / "model_index.json").is_file()
    card = ModelCard(_pipeline_card(name, folder) if is_pipeline else tokenizer_card(name))
    pretrained = getattr(args, "pretrained_transformer", None) or getattr(args, "pretrained_vqvae", None)
    card.data.license = args.hub_license
    dataset, split = _source(args)
    card.data.datasets = [dataset] if _is_on_hub(dataset) else None
    card.data.base_model = pretrained if _is_on_hub(pretrained) else None

    metrics = read_metrics(folder / "metrics.jsonl")
    images = sorted(folder.glob("samples/step-*.png"), key=lambda path: int(re.sub(r"\D", "", path.stem)))[-1:]
    images += folder.glob("training_curves.png")
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    card.text += training_sections(
        data=_describe(dataset, split),
        num_train_samples=num_train_samples,
        command=_command(args),
        max_train_steps=args.max_train_steps,
        samples_per_step=args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
        num_processes=accelerator.num_processes,
        device=accelerator.device.type,
        mixed_precision=accelerator.mixed_precision,
        versions=f"Python {platform.python_version()}, dnd_hf {__version__}, {versions}",
        step=metrics[-1]["step"] if metrics else 0,
        metrics=_metrics_table(metrics),
        caption=_samples(folder, is_pipeline),
        images=[path.relative_to(folder).as_posix() for path in images],
        license=args.hub_license,
    )
    write_text(folder / "README.md", str(card))


def upload_run(folder: Path, repo_id: str) -> None:
    """Uploads the folder of a run, without its checkpoints. What an earlier, interrupted upload sent is not sent again.

    Raises:
        RuntimeError: it failed; the message has the command that continues it.
    """
    try:
        commit = upload_folder(
            repo_id=repo_id, folder_path=folder, ignore_patterns=[NOT_UPLOADED], commit_message="Upload training run"
        )
    except Exception as error:  # also those of the HTTP library
        raise RuntimeError(
            f"the result is complete in {folder}, but its upload failed: {error}\nTo continue the upload:\n\n"
            f"    hf upload {repo_id} {shlex.quote(str(folder))} --exclude '{NOT_UPLOADED}'\n"
        ) from error
    print(f"{folder} is on the Hub: {commit.commit_url}")


def _pipeline_card(name: str, folder: Path) -> str:
    config = AutoConfig.from_pretrained(folder / "transformer")
    return pipeline_card(name, config.num_classes, config.model_type)


def _samples(folder: Path, is_pipeline: bool) -> str:
    """What the sample grid shows."""
    if not is_pipeline:
        return TOKENIZER_SAMPLES
    return PROMPT_SAMPLES if (folder / "tokenizer").is_dir() else PIPELINE_SAMPLES


def _is_on_hub(name: str | None) -> bool:
    return name is not None and name != "words" and not Path(name).exists()


def _source(args: RunArguments) -> tuple[str | None, str]:
    """The data set that was trained on, also where its codes were, and the split."""
    notes = Path(getattr(args, "codes_dir", None) or "", "extraction.json")
    if notes.is_file():
        settings = read_json(notes)
        return settings["dataset_name"], settings["dataset_split"]
    return args.dataset_name, args.dataset_split


def _describe(dataset: str | None, split: str) -> str:
    if dataset is None:
        return "Not named"
    if dataset == "words":
        return "`words`: images of words that dnd_hf renders"
    if _is_on_hub(dataset):
        return f"[{dataset}](https://huggingface.co/datasets/{dataset}), {split}"
    return f"The local data set `{public(dataset)}`"


def _command(args: RunArguments) -> str:
    """The command line of the options that are not at their defaults, but for those of resuming and publishing."""
    lines = [f"accelerate launch {Path(sys.argv[0]).name}"]
    for field in fields(args):
        value = getattr(args, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value == default or field.name.startswith(("hub_", "push_", "resume_")):
            continue
        values = value if isinstance(value, list) else [value]
        lines.append(shlex.join([f"--{field.name}", *(str(public(value)) for value in values)]))
    return " \\\n    ".join(lines)


def _metrics_table(metrics: list[dict]) -> str:
    """Markdown: the last value of every validation metric, a row a depth, and a row for those of all depths."""
    last = {name: value for line in metrics for name, value in line.items() if name.startswith("validation/")}
    rows: dict[str, dict[str, float]] = {}
    for name, value in last.items():
        metric, _, depth = name.removeprefix("validation/").partition("_depth_")
        rows.setdefault(depth or "all", {})[metric] = value
    names = sorted({name for row in rows.values() for name in row})
    lines = [{"depth": depth} | {name: rows[depth].get(name) for name in names} for depth in sorted(rows)]
    return markdown_table(lines) if lines else "None."  # sorted: digits come before letters
