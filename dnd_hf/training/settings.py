"""What a run's result depends on: written into its checkpoints, and compared when it resumes."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from ..arguments import RunArguments
from ..files import changes_of, read_json, write_json


FILE = "settings.json"

CHANGEABLE = (
    "output_dir",
    "resume_from_checkpoint",
    "max_train_steps",
    "num_train_epochs",
    "train_batch_size",  # these two may change as long as `samples_per_step`, their product, stays
    "gradient_accumulation_steps",
    "mixed_precision",  # as an option; the precision that it leads to is compared
    "logging_steps",
    "validation_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "num_samples",
    "dataloader_num_workers",
    "max_broken_share",
    "report_to",
    "torch_compile",
    "gradient_checkpointing",
    "attn_implementation",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "hub_license",
)
"""Options that a run may resume with other values of: its length, what it reports, how fast it computes."""


def public(value: Any) -> Any:
    """An option's value without the place of a local file: its last name only."""
    if not isinstance(value, (str, Path)) or value == "":
        return value
    path = Path(value)
    return path.resolve().name if path.is_absolute() or path.exists() else str(value)


def write_settings(folder: Path, args: RunArguments, facts: Mapping[str, Any]) -> None:
    """Writes the options of a run, and the `facts` of [`check_settings`], into its checkpoint."""
    options = {name: public(value) for name, value in asdict(args).items()}
    write_json(folder / FILE, {"options": options, "facts": dict(facts)})


def check_settings(checkpoint: Path, args: RunArguments, facts: Mapping[str, Any]) -> str:
    """Compares a run that is about to resume with what its checkpoint was trained with.

    Args:
        checkpoint: whose record is read.
        args: options of the run now; all but `CHANGEABLE` must be as they were.
        facts: what else the result depends on, as JSON values; all must be as they were.

    Returns:
        A sentence about options of `CHANGEABLE` that are not as they were, or about a missing record; else "".

    Raises:
        ValueError: another setting differs; the message names each with its old and its new value.
    """
    if not (checkpoint / FILE).is_file():
        return f"{checkpoint} has no record of its settings, which are therefore not compared."
    record = read_json(checkpoint / FILE)
    options = {name: public(value) for name, value in asdict(args).items()}
    changed = [change for name in options for change in _changes(record["options"], options, name)]
    fixed = [text for name, text in changed if name not in CHANGEABLE]
    fixed += [text for name in facts for _, text in _changes(record["facts"], facts, name)]
    if fixed:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {'; '.join(fixed)}. Give the same ones, or start a new"
            " run in another `output_dir`."
        )
    told = [text for name, text in changed if name not in ("output_dir", "resume_from_checkpoint")]
    return f"Changed since {checkpoint.name}: {'; '.join(told)}." if told else ""


def _changes(earlier: Mapping[str, Any], now: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """`[(name, what changed)]`, or `[]`; what an older version did not record has not changed."""
    if name not in earlier:
        return []
    return [(name, text) for text in changes_of({name: earlier[name]}, {name: now[name]})]


def model_settings(model: ModelMixin) -> dict[str, Any]:
    """The configuration of a model of diffusers, without what says where it came from or which version wrote it."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def fingerprint(model: ModelMixin) -> str:
    """A hash of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
