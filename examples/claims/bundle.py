"""Stores a trained pipeline as the package bundles it: float16 weights and JSON, no code.

python examples/claims/bundle.py --model dnd --output_dir dnd_hf/bundled/verses
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

from dnd_hf import DnDPipeline, bundled_checkpoint
from dnd_hf.command_line import loading, run_script
from dnd_hf.files import read_json, write_json


@dataclass
class BundleArguments:
    """Options of this script; they can also be in a YAML file given as `--config`."""

    model: str = HfArg(help="Folder of the trained pipeline.")
    output_dir: str = HfArg(help="Folder to write.")

    def __post_init__(self) -> None:
        if Path(self.output_dir).exists():
            raise ValueError(f"`output_dir` must be a new folder, {self.output_dir} exists already.")


def main(args: BundleArguments) -> None:
    folder = Path(args.output_dir)
    with loading(args.model):
        pipeline = DnDPipeline.from_pretrained(args.model, dtype=torch.float16)
    pipeline.save_pretrained(folder)
    for code in folder.rglob("*.py"):
        code.unlink()
    for component in ("transformer", "vqvae"):
        file = folder / component / "config.json"
        config = read_json(file)
        config.pop("auto_map")
        write_json(file, config)
    # The index of any bundled pipeline: it names modules of the installed package.
    (folder / "model_index.json").write_bytes(Path(bundled_checkpoint("words"), "model_index.json").read_bytes())


if __name__ == "__main__":
    run_script(main, BundleArguments)
