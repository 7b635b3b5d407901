"""Metrics of a training run: the means since the last line of the log; metrics.jsonl, written and read back."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from torch import Tensor

from ..files import write_text


class MetricsWindow:
    """The metrics of the forward passes since the window was last closed, and the time that they took."""

    def __init__(self):
        self.passes: list[dict[str, Tensor]] = []
        self.started = perf_counter()

    def restart(self) -> None:
        """Forgets what there is and starts the clock."""
        self.passes, self.started = [], perf_counter()

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Takes the scalars of one forward pass; they stay on their device."""
        self.passes.append({name: value.detach() for name, value in metrics.items()})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside takes no time of the window."""
        paused = perf_counter()
        yield
        self.started += perf_counter() - paused

    def close(self, accelerator: Accelerator) -> tuple[dict[str, float], int, float]:
        """Starts the next window; to be called by all processes.

        Returns:
            The mean over passes and processes of each metric of the last pass; the number of passes; their seconds.
        """
        names = self.passes[-1]
        means = {name: torch.stack([one[name] for one in self.passes if name in one]).mean() for name in names}
        values = {name: value.item() for name, value in accelerator.reduce(means, "mean").items()}
        num_passes, seconds = len(self.passes), perf_counter() - self.started
        self.restart()
        return values, num_passes, seconds


class JsonlTracker(GeneralTracker):
    """Accelerate tracker that appends one JSON object a line to a file.

    Args:
        path: the file; lines of steps after `first_step`, which a resumed run repeats, are dropped from it.
        first_step: where the run starts, 0 for a new one.
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: str | Path, first_step: int = 0):
        super().__init__()
        self.path, self.first_step = Path(path), first_step

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def start(self) -> None:
        kept = [line for line in read_metrics(self.path) if line["step"] <= self.first_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept if self.first_step))

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: str | Path) -> list[dict]:
    """The objects of a metrics.jsonl, `[]` where there is none; a last line cut off by a kill is left out."""
    lines = Path(path).read_text().splitlines(keepends=True) if Path(path).exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
