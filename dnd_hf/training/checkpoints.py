"""Checkpoints of a training run: `checkpoint-<step>` folders that are either whole or not there."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..files import remove, written_whole


def list_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def find_checkpoint(output_dir: str | Path, resume_from: str | None) -> tuple[int, Path | None]:
    """(step, folder) to resume from; (0, None) to start anew.

    Args:
        output_dir: folder of the run.
        resume_from: `None`, a checkpoint folder, or `latest`: the newest in `output_dir`, if there is one.

    Raises:
        ValueError: `resume_from` is not a checkpoint folder.
    """
    if resume_from is None:
        return 0, None
    if resume_from == "latest":
        return max(list_checkpoints(output_dir), default=(0, None))
    path = Path(resume_from)
    for step, checkpoint in list_checkpoints(path.parent):
        if checkpoint.name == path.name:
            return step, checkpoint
    raise ValueError(f"{resume_from} is not a checkpoint folder (`checkpoint-<step>`).")


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, step: int, total_limit: int, export: Callable[[Path], None]
) -> None:
    """Saves the run's state as `checkpoint-<step>`, to be called by all processes.

    A run that is killed meanwhile leaves the checkpoints before it, and a folder that [`remove_unfinished`] removes.

    Args:
        accelerator: whose prepared and registered objects are saved.
        output_dir: folder of the run.
        step: steps of the optimizer done.
        total_limit: older checkpoints are deleted beyond this number.
        export: called by all processes with the folder, to add what can be used without resuming.
    """
    is_main = accelerator.is_main_process
    with written_whole(Path(output_dir, f"checkpoint-{step}")) if is_main else nullcontext() as unfinished:
        (folder,) = broadcast_object_list([str(unfinished)])
        accelerator.save_state(folder)
        export(Path(folder))
        accelerator.wait_for_everyone()
    if is_main:
        for _, path in list_checkpoints(output_dir)[:-total_limit]:
            remove(path)
    accelerator.wait_for_everyone()


def remove_unfinished(output_dir: str | Path) -> None:
    """Removes what an earlier run of this folder was writing when it was killed."""
    for path in Path(output_dir).glob(".*.unfinished"):
        remove(path)
