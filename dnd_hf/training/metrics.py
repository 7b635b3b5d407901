"""metrics.jsonl of a training run: written as a tracker of Accelerate, and read back."""

import json
from pathlib import Path

from accelerate.tracking import GeneralTracker, on_main_process


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
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept if self.first_step))

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: str | Path) -> list[dict]:
    """The objects of a metrics.jsonl, `[]` where there is none; a last line cut off by a kill is left out."""
    lines = Path(path).read_text().splitlines(keepends=True) if Path(path).exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
