"""What people look at: grids of images, plots, and tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.utils import make_image_grid
from PIL import Image


def save_image_grid(images: list[Image.Image], columns: int, path: str | Path) -> None:
    """Writes images of one size as a grid, row by row; the last row is filled with black."""
    rows = -(-len(images) // columns)
    blanks = [Image.new("RGB", images[0].size)] * (rows * columns - len(images))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images + blanks, rows, columns).save(path)


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, digits: int = 5) -> str:
    """A table of rows. Columns that are None in every row are left out; numbers have so many significant digits.

    `columns` are those of the first row where None.
    """
    columns = [name for name in columns or rows[0] if any(row.get(name) is not None for row in rows)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    def show(value: Any) -> str:
        return "" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value)

    lines = [line(columns), "|" + "---|" * len(columns)]
    return "\n".join(lines + [line([show(row.get(name)) for name in columns]) for row in rows])


def import_figure() -> type:
    """matplotlib's `Figure`; ImportError, saying what to install, without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install ".[eval]" in a clone of dnd_hf') from error
    return Figure


def plot_training_curves(metrics: Sequence[dict], path: str | Path) -> None:
    """Draws the lines of a metrics.jsonl over their `step`: loss and what is validated first and large, then the other
    metrics, those of all depths in one panel, and last and small how fast the run was."""
    figure_class = import_figure()
    panels = _training_panels(metrics)
    if not panels:
        return
    rows = [(height, row) for size, columns, height in ROWS for row in _in_rows(panels, size, columns)]
    heights = [height for height, _ in rows]
    figure = figure_class(figsize=(13, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(rows), 12, height_ratios=heights)
    for number, (height, row) in enumerate(rows):
        width = 12 // len(row) if height == ROWS[0][2] else 12 // max(len(row), 4)
        for place, title in enumerate(row):
            axes = figure.add_subplot(grid[number, place * width : (place + 1) * width])
            for label, points in panels[title][1]:
                axes.plot(*zip(*points), label=label, marker="o" if len(points) < 20 else None, markersize=3)
            axes.set_title(title, fontsize=11 if height == ROWS[0][2] else 9)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
            if len(panels[title][1]) > 1:
                axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


ROWS = (("large", 3, 4.0), ("medium", 4, 2.6), ("small", 6, 1.7))
"""Sizes of panels of training curves: name, panels in a row, height in inches."""
SMALL = ("learning_rate", "grad_norm", "images_per_second", "tokens_per_second", "mfu", "peak_memory_gb")


def _training_panels(metrics: Sequence[dict]) -> dict[str, tuple[str, list[tuple[str, list[tuple[int, float]]]]]]:
    """Title -> (size, [(label, points)]) of each panel."""
    panels: dict[str, tuple[str, dict[str, list[tuple[int, float]]]]] = {}
    for line in metrics:
        for name, value in line.items():
            stage, _, metric = name.rpartition("/")
            base, _, depth = metric.partition("_depth_")
            if name == "step":
                continue
            title = f"{base} by depth, {stage}" if depth else base
            size = "small" if base in SMALL else "medium"
            _, curves = panels.setdefault(title, (size, {}))
            curves.setdefault(f"depth {depth}" if depth else stage, []).append((line["step"], value))
            if not depth and (base == "loss" or stage == "validation"):
                panels[title] = ("large", curves)
    first = ("loss", *panels)
    return {title: (panels[title][0], list(panels[title][1].items())) for title in first if title in panels}


def _in_rows(panels: dict, size: str, columns: int) -> list[list[str]]:
    titles = [title for title in panels if panels[title][0] == size]
    return [titles[start : start + columns] for start in range(0, len(titles), columns)]


def plot_codes(codes: Sequence[dict], path: str | Path) -> None:
    """Use and norms of the codes of each depth (arXiv 2410.01912, Figure 4).

    `codes`: the dicts of `code_statistics`, with `depth`. Boxes are quartiles, whiskers 5 and 95 %, triangles means.
    """
    figure = import_figure()(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    depths = [row["depth"] for row in codes]
    left.bar(depths, [100 * row["usage"] for row in codes])
    left.set(xlabel="depth", ylabel="codes in use, %", xticks=depths, ylim=(0, 100))
    names = ("whislo", "q1", "med", "q3", "whishi")
    boxes = [dict(zip(names, row["norm_quantiles"]), mean=row["norm_mean"], fliers=[]) for row in codes]
    right.bxp(boxes, positions=depths, showmeans=True, showfliers=False)
    right.set(xlabel="depth", ylabel="norm of codes as they occur")
    figure.savefig(path, dpi=100)


def plot_curves(rows: Sequence[dict], series: str, metrics: Sequence[str], path: str | Path) -> None:
    """A panel for each of `metrics` over the models in their order, a line for each value of `series`.

    `rows` are dicts with `model`, `series` and the metrics; those that are None everywhere have no panel.
    """
    metrics = [name for name in metrics if any(row.get(name) is not None for row in rows)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = import_figure()(figsize=(4 * len(metrics), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(metrics), squeeze=False).flat, metrics, strict=True):
        for value in dict.fromkeys(row[series] for row in rows):
            points = [(models.index(row["model"]), row[name]) for row in rows if row[series] == value]
            axes.plot(*zip(*points), marker="o", label=f"{series} {value}")
        axes.set_xticks(range(len(models)), [model[-24:] for model in models], rotation=30, ha="right", fontsize=8)
        axes.set_title(name)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
