"""Chooses the learning rate of the run with the lowest held-out loss, and writes the settings to train with.

python examples/claims/best_learning_rate.py --runs tune-1e-3 tune-3e-3 --settings pages_flow.yaml --output_dir tuned

`--runs` are output folders of diffusion.py or train.py that differ in nothing but the learning rate. `config.yaml` in
the output folder is `--settings` with the rate that was chosen; results.json has the losses of all.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers.hf_argparser import HfArg

from dnd_hf.command_line import run_script
from dnd_hf.files import read_json, write_json
from dnd_hf.training.checkpoints import find_checkpoint
from dnd_hf.training.metrics import read_metrics
from dnd_hf.training.settings import FILE


def read_run(folder: Path) -> dict:
    """Of a run: its options, `steps`, and the `loss` of its last validation.

    Raises:
        ValueError: it has no checkpoint, or was not validated at that step.
    """
    steps, checkpoint = find_checkpoint(folder, "latest")
    lines = read_metrics(folder / "metrics.jsonl") if checkpoint else []
    losses = [line["validation/loss"] for line in lines if line["step"] == steps and "validation/loss" in line]
    if not losses:
        raise ValueError(f"{folder} has no held-out loss at its last step.")
    options = read_json(checkpoint / FILE)["options"]
    return {"options": options, "steps": steps, "loss": losses[-1]}


def compare(folders: list[Path]) -> list[dict]:
    """A row for each run, by learning rate; the one with the lowest loss has `chosen`.

    Raises:
        ValueError: the runs differ in other options or in their steps, or two have one learning rate.
    """
    runs = {folder: read_run(folder) for folder in folders}
    first = next(iter(runs.values()))
    for folder, run in runs.items():
        other = {name for name, value in run["options"].items() if first["options"].get(name) != value}
        if other - {"learning_rate", "output_dir"} or run["steps"] != first["steps"]:
            raise ValueError(f"{folder} and {folders[0]} differ in more than their learning rate.")
    rates = {folder: run["options"]["learning_rate"] for folder, run in runs.items()}
    if len(set(rates.values())) < len(rates):
        raise ValueError("two runs have one learning rate.")
    best = min(runs, key=lambda folder: runs[folder]["loss"])
    return [
        {
            "run": str(folder),
            "learning rate": rates[folder],
            "steps": runs[folder]["steps"],
            "held-out loss": runs[folder]["loss"],
            "chosen": folder == best,
        }
        for folder in sorted(runs, key=rates.__getitem__)
    ]


@dataclass
class ChoiceArguments:
    """Options of this script."""

    runs: list[Path] = HfArg(help="Output folders of the runs.")
    settings: Path = HfArg(help="YAML file of the other settings.")
    output_dir: Path = HfArg(help="Folder of config.yaml and results.json.")


def main(args: ChoiceArguments) -> None:
    rows = compare(args.runs)
    rate = next(row["learning rate"] for row in rows if row["chosen"])
    settings = yaml.safe_load(args.settings.read_text(encoding="utf-8")) | {"learning_rate": rate}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    write_json(args.output_dir / "results.json", {"learning_rate": rate, "runs": rows})
    print(f"{args.output_dir}/config.yaml: the learning rate is {rate:g}")
    if len(rows) > 1 and (rows[0]["chosen"] or rows[-1]["chosen"]):
        print("It is the lowest or highest of those compared: a rate beyond it may be better.")


if __name__ == "__main__":
    run_script(main, ChoiceArguments)
