"""What an evaluation leaves: results.json, results.md, texts.jsonl, and images beside them."""

import contextlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..figures import markdown_table
from ..files import write_json, write_text
from ..messages import counted
from .images import Failure


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


@dataclass
class Report:
    """What a task found.

    Args:
        rows: the table, a dict for each line; the first key is `model`.
        failures: what was left out: dicts of `model` and those of [`Failure`].
        images: captions of image files in the folder of the results, by their names.
        not_measured: why, by the name of the metric.
        tables: further tables, by their headings in results.md.
        details: what else stands in results.json, by its key there.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def add_failures(self, model: str, failures: Sequence[Failure]) -> None:
        """Adds what was left out of the measurement of a model."""
        self.failures += [{"model": model, **failure.to_dict()} for failure in failures]

    def markdown(self, task: str) -> str:
        """A heading, the tables, what was not measured and what was left out."""
        lines = [f"# {task}", "", markdown_table(self.rows), ""]
        for heading, rows in self.tables.items():
            lines += [f"## {heading}", "", markdown_table(rows), ""]
        for metric, reason in self.not_measured.items():
            lines += [f"Not measured: {metric}, because {reason}", ""]
        lines += [f"{counted(len(self.failures), 'image')} left out" + (":" if self.failures else "."), ""]
        if self.failures:
            lines += [markdown_table(self.failures[:100]), ""]
        if len(self.failures) > 100:
            lines += [f"... and {len(self.failures) - 100} more, in results.json.", ""]
        return "\n".join(lines)

    def write(
        self, output_dir: str | Path, task: str, settings: Mapping[str, Any], device: str | torch.device = "cpu"
    ) -> None:
        """Writes results.json and results.md, with the settings, the versions of packages and the machine.

        Args:
            output_dir: made where missing.
            task: the heading.
            settings: JSON values.
            device: on which the metrics were computed.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        found = {"rows": self.rows, "not_measured": self.not_measured, "failures": self.failures}
        results = {"task": task, "settings": settings, **self.details, **found, **environment(device)}
        write_json(folder / "results.json", results)
        lines = [self.markdown(task)]
        for name, caption in self.images.items():
            lines += [f"![{caption}]({name})", "", caption, ""]
        given = {name: value for name, value in settings.items() if value is not None}
        lines += ["```json", json.dumps(given, indent=2), "```", ""]
        write_text(folder / "results.md", "\n".join(lines))


def environment(device: str | torch.device) -> dict:
    """`versions` of Python and of the packages that are installed, and the `machine`: what metrics may depend on."""
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


def write_json_lines(path: str | Path, rows: Sequence[dict]) -> None:
    """One JSON object per line; the folder is made where missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
