"""Checkpoints of a training run: `checkpoint-<step>` folders that are either whole or not there."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator


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

    The folder is written under another name and then renamed, so a run that is killed leaves no half checkpoint.

    Args:
        accelerator: whose prepared and registered objects are saved.
        output_dir: folder of the run.
        step: steps of the optimizer done.
        total_limit: older checkpoints are deleted beyond this number.
        export: called by all processes with the folder, to add what can be used without resuming.
    """
    target = Path(output_dir, f"checkpoint-{step}")
    unfinished = Path(output_dir, "checkpoint-unfinished")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    export(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        for _, path in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()
