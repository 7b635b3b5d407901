"""The table of the rows and the plots of growth."""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dnd_hf.figures import import_figure, markdown_table
from dnd_hf.files import write_json, write_text


COLUMNS = (
    "section",
    "what",
    "unit",
    "ours",
    "spread",
    "reference",
    "ratio",
    "times_floor",
    "times_packed_floor",
    "passes",
    "first_row_s",
)


def describe_machine(device: torch.device) -> dict[str, str]:
    """What the numbers depend on: the device, the system and the versions."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(rows: Sequence[dict]) -> str:
    """The rows in Markdown; metrics that only some have come last, by name."""
    others = sorted({name for line in rows for name in line} - set(COLUMNS))
    return markdown_table(rows, [*COLUMNS, *others], digits=3)


def write_results(folder: Path, machine: dict, arguments: dict, rows: Sequence[dict]) -> None:
    """Writes benchmark.json and benchmark.md, and the plots where growth was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "benchmark.json", {"machine": machine, "arguments": arguments, "rows": rows})
    write_text(folder / "benchmark.md", f"{table(rows)}\n")
    if any(line["section"] == "growth" for line in rows):
        plot_growth(rows, folder)


def plot_growth(rows: Sequence[dict], folder: Path) -> None:
    """growth_batch.png: images/s against the batch; growth_grid_depth.png: seconds per image against grid and depth."""

    def draw(axes, kind: str, label: str, of: Callable[[float], float]) -> None:
        lines = [line for line in rows if line.get("against") == kind]
        values = [line["value"] for line in lines]
        axes.plot(values, [of(line["ours"]) for line in lines], "o-", label="ours")
        for name in ("floor", "packed_floor"):
            rates = [line["ours"] * line[f"times_{name}"] for line in lines if f"times_{name}" in line]
            if rates:
                axes.plot(values, [of(rate) for rate in rates], "o--", label=name.replace("_", " "))
        axes.set_xticks(values)
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
        axes.legend()

    figure = import_figure()(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    draw(axes, "batch", "images at once", lambda rate: rate)
    axes.set_ylabel("images/s")
    figure.savefig(folder / "growth_batch.png", dpi=120)
    figure = import_figure()(figsize=(9, 3.5), layout="constrained")
    grid, depth = figure.subplots(1, 2)
    draw(grid, "grid", "rows and columns of the grid", lambda rate: 1 / rate)
    draw(depth, "depth", "codes per position", lambda rate: 1 / rate)
    grid.set_ylabel("seconds per image")
    figure.savefig(folder / "growth_grid_depth.png", dpi=120)
