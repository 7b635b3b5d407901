"""Runs what a claim of the paper needs, where it is not done yet, and shows what came out.

python examples/claims/run.py --claim C2 --state_dir runs/claims --vqvae rqvae
python examples/claims/run.py --claim C2 --state_dir runs/claims --only C2/dnd-2 --seeds 1
python examples/claims/run.py --claim C2 --state_dir runs/claims --tables

CLAIM.yaml beside this file has the commands: a script of examples/ and its options. Each is run in the state folder,
with the name before it as `--output_dir`; files of examples/ (`--config claims/pages_transformer.yaml`) are found.
Whatever was interrupted resumes when the same command is given again. `finished.jsonl` in the state folder says what is
done and how long it took. `--quick` runs everything at a size where it means nothing, to see that it runs.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers.hf_argparser import HfArg

from dnd_hf.command_line import run_script


HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
CLAIMS = sorted(path.stem for path in HERE.glob("C*.yaml"))


@dataclass
class ClaimArguments:
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    claim: str = HfArg(metadata={"choices": CLAIMS}, help="Which of the paper's claims.")
    state_dir: str = HfArg(default="runs/claims", help="Folder of all that is made.")
    vqvae: str | None = HfArg(
        default=None, help="Folder of the trained tokenizer whose networks encode the pages; not needed for --tables."
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="One run of each variant for each.")
    only: str = HfArg(default="", help="Only the steps whose name begins so, and what the claim needs.")
    quick: bool = HfArg(default=False, help="A few steps on a few images: does it run?")
    tables: bool = HfArg(default=False, help="Run nothing; show what is there.")

    def __post_init__(self):
        if self.tables:
            return
        if self.vqvae is None:
            raise ValueError("`vqvae` is needed: the folder of a tokenizer.")
        if not Path(self.vqvae, "config.json").is_file():
            raise ValueError(f"`vqvae` must be the folder of a tokenizer, there is no {self.vqvae}/config.json.")


def read_plan(claim: str) -> dict:
    """The YAML file of a claim."""
    return yaml.safe_load((HERE / f"{claim}.yaml").read_text(encoding="utf-8"))


def steps_of(claim: str, seeds: list[int], quick: bool = False) -> dict[str, str]:
    """Name -> command of each step of a claim in order: what it needs first, then seed by seed.

    `{variant}`, the settings of a variant and `{seed}` are filled in; other fields in braces stay.
    """
    plan = read_plan(claim)
    steps = {name: step for needed in plan.get("needs", []) for name, step in steps_of(needed, seeds, quick).items()}
    extra = plan.get("quick", {}) if quick else {}

    def add(name: str, command: str, **values) -> None:
        command = f"{command} {extra.get(name, '')}".strip()
        for _ in range(2):  # the settings of a variant may hold fields too
            name, command = (fill(text, values) for text in (name, command))
        steps[name] = command

    for name, command in plan.get("steps", {}).items():
        add(name, command)
    for seed in seeds:
        for variant, settings in plan.get("variants", {}).items():
            for name, command in plan["steps_of_each_seed"].items():
                add(name, command, variant=variant, seed=seed, **settings)
        for name, command in plan.get("steps_after_each_seed", {}).items():
            add(name, command, seed=seed)
    return steps


def fill(text: str, values: dict) -> str:
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def finished(state_dir: Path) -> dict[str, dict]:
    """What finished.jsonl says of each step: its `command` and the `seconds` that it took."""
    file = state_dir / "finished.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {line["step"]: line for line in map(json.loads, lines)}


def run_step(name: str, command: str, state_dir: Path) -> None:
    """Runs a command to its end and notes it.

    Raises:
        RuntimeError: the command failed; its own output says why.
    """
    script, *options = shlex.split(command)
    print(f"{name}: {command}", flush=True)
    start, resumed = time.time(), (state_dir / name).exists()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])}
    options = [str(EXAMPLES / option) if (EXAMPLES / option).is_file() else option for option in options]
    line = [sys.executable, str(EXAMPLES / script), *options, "--output_dir", name]
    code = subprocess.run(line, cwd=state_dir, env=environment).returncode
    if code:
        raise RuntimeError(f"{name} ended with code {code}; the same command resumes it.")
    note = {"step": name, "command": command, "seconds": round(time.time() - start), "resumed": resumed}
    with (state_dir / "finished.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")


def main(args: ClaimArguments) -> None:
    state_dir = Path(args.state_dir)
    state_dir.mkdir(parents=True, exist_ok=True)
    if not args.tables:
        done = finished(state_dir)
        for name, command in steps_of(args.claim, args.seeds, args.quick).items():
            command = command.replace("{vqvae}", str(Path(args.vqvae).resolve()))
            if name in done:
                if done[name]["command"] != command:
                    raise ValueError(f"{name} was made by another command: {done[name]['command']}")
            elif not name.startswith(args.claim) or name.startswith(args.only):
                run_step(name, command, state_dir)
    from tables import show

    show(args.claim, read_plan(args.claim), state_dir)


if __name__ == "__main__":
    run_script(main, ClaimArguments)
