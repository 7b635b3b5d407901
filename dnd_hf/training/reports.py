"""What a training run leaves to look at: metrics.jsonl, training_curves.png and grids of pictures."""

import json
from pathlib import Path

from accelerate.tracking import GeneralTracker, on_main_process
from diffusers.utils import make_image_grid
from PIL import Image


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


def plot_training_curves(metrics_path: str | Path, output_path: str | Path) -> None:
    """Draws every number of a metrics.jsonl over the steps, one panel each. Does nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(metrics_path):
        for name, value in line.items():
            if name != "step":
                curves.setdefault(name, []).append((line["step"], value))
    if not curves:
        return
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4 * columns, 2.5 * rows), layout="constrained")
    for place, (name, points) in enumerate(sorted(curves.items()), start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.plot(*zip(*points))
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    figure.savefig(output_path, dpi=100)


def save_image_grid(images: list[Image.Image], columns: int, path: str | Path) -> None:
    """Writes pictures of one size as a PNG, row by row; the last row is filled with black."""
    rows = -(-len(images) // columns)
    blanks = [Image.new("RGB", images[0].size)] * (rows * columns - len(images))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images + blanks, rows, columns).save(path)
