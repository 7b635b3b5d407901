"""What an evaluation leaves: results.json, results.md, texts.jsonl, and pictures beside them."""

import contextlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data.images import to_images
from ..figures import import_figure, markdown_table, save_image_grid


PACKAGES = (
    "dnd-hf",
    "torch",
    "transformers",
    "diffusers",
    "numpy",
    "pillow",
    "matplotlib",
    "rapidocr-onnxruntime",
    "onnxruntime",
    "pytesseract",
    "rouge-score",
    "jiwer",
    "torchmetrics",
    "torch-fidelity",
    "lpips",
)


def environment(device: str | torch.device) -> dict:
    """`versions` of Python and of the packages that are installed, and the `machine`: what figures may depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
    }
    return {"versions": versions, "machine": machine}


def write_results(output_dir: str | Path, results: dict, pictures: Mapping[str, str] | None = None) -> None:
    """Writes results.json and results.md.

    Args:
        output_dir: made where missing.
        results: JSON values; `task`, `settings` (a dict), `rows` (dicts that form the table) and `failures` (dicts that
            say what was left out) also stand in results.md.
        pictures: captions of files in `output_dir`, by their names.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    failures = results.get("failures", [])
    lines = [f"# {results['task']}", "", markdown_table(results["rows"]), ""]
    lines += [f"{len(failures)} pictures were left out" + (":" if failures else "."), ""]
    if failures:
        lines += [markdown_table(failures[:100]), ""]
        if len(failures) > 100:
            lines += [f"... and {len(failures) - 100} more, in results.json.", ""]
    for name, caption in (pictures or {}).items():
        lines += [f"![{caption}]({name})", "", caption, ""]
    settings = {name: value for name, value in results["settings"].items() if value is not None}
    lines += ["```json", json.dumps(settings, indent=2), "```", ""]
    (folder / "results.md").write_text("\n".join(lines), encoding="utf-8")


def write_json_lines(path: str | Path, rows: Sequence[dict]) -> None:
    """One JSON object a line; the folder is made where missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def save_reconstructions(columns: Tensor, path: str | Path) -> None:
    """Writes `(n, versions, 3, H, W)` pictures in [-1, 1] as a grid, a row each."""
    save_image_grid(to_images(columns.flatten(0, 1)), columns.shape[1], path)


def save_contact_sheet(files: Sequence[str | Path], columns: int, path: str | Path) -> None:
    """Writes the pictures of some files, of one size, as a grid."""
    save_image_grid([Image.open(file).convert("RGB") for file in files], columns, path)


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


def plot_curves(rows: Sequence[dict], series: str, measures: Sequence[str], path: str | Path) -> None:
    """A panel for each of `measures` over the models in their order, a line for each value of `series`.

    `rows` are dicts with `model`, `series` and the measures; those that are None everywhere have no panel.
    """
    measures = [name for name in measures if any(row.get(name) is not None for row in rows)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = import_figure()(figsize=(4 * len(measures), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(measures), squeeze=False).flat, measures, strict=True):
        for value in dict.fromkeys(row[series] for row in rows):
            points = [(models.index(row["model"]), row[name]) for row in rows if row[series] == value]
            axes.plot(*zip(*points), marker="o", label=f"{series} {value}")
        axes.set_xticks(range(len(models)), [model[-24:] for model in models], rotation=30, ha="right", fontsize=8)
        axes.set_title(name)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
