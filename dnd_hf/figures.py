"""What people look at: grids of images, plots, and tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.utils import make_image_grid
from PIL import Image


def save_image_grid(images: list[Image.Image], columns: int, path: str | Path) -> None:
    """Writes pictures of one size as a PNG, row by row; the last row is filled with black."""
    rows = -(-len(images) // columns)
    blanks = [Image.new("RGB", images[0].size)] * (rows * columns - len(images))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images + blanks, rows, columns).save(path)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows, its columns those of the first row that are not None everywhere; numbers to five digits."""
    columns = [name for name in rows[0] if any(row.get(name) is not None for row in rows)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    def show(value: Any) -> str:
        return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)

    lines = [line(columns), "|" + "---|" * len(columns)]
    return "\n".join(lines + [line([show(row.get(name)) for name in columns]) for row in rows])


def import_figure() -> type:
    """matplotlib's `Figure`; ImportError, saying what to install, without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "dnd-hf[eval]"') from error
    return Figure


def plot_training_curves(metrics: Sequence[dict], path: str | Path) -> None:
    """Draws every number of the lines of a metrics.jsonl over their `step`, one panel each."""
    figure_class = import_figure()
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name != "step":
                curves.setdefault(name, []).append((line["step"], value))
    if not curves:
        return
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure = figure_class(figsize=(4 * columns, 2.5 * rows), layout="constrained")
    for place, (name, points) in enumerate(sorted(curves.items()), start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.plot(*zip(*points))
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
