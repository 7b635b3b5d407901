"""Measures a trained pipeline and writes the figures, with all that is needed to get them again, to results.json.

python examples/evaluate.py --task words --model words --output_dir runs/evaluate-words
"""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser

from dnd_hf import DnDPipeline, __version__, bundled_checkpoint
from dnd_hf.evaluation.ocr import RapidOCR
from dnd_hf.evaluation.words import evaluate_words


BUNDLED = ("words",)
PACKAGES = (
    "torch",
    "transformers",
    "diffusers",
    "numpy",
    "pillow",
    "matplotlib",
    "rapidocr-onnxruntime",
    "onnxruntime",
)


@dataclass
class Arguments:
    task: Literal["words"] = field(metadata={"help": "What to measure: words (are generated words read back?)."})
    model: str = field(metadata={"help": "Folder or Hub id of a DnDPipeline, or `words`: the bundled checkpoint."})
    output_dir: str = field(metadata={"help": "Folder for results.json; made where missing."})
    num_images_per_word: int = field(default=20, metadata={"help": "Pictures generated of each word, at least 2."})
    seed: int = field(default=0, metadata={"help": "Seed of the generated and of the real pictures."})
    batch_size: int = field(
        default=100, metadata={"help": "Pictures generated at once; the figures do not depend on it."}
    )
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where the model runs."}
    )


def main(args: Arguments) -> None:
    # Before anything slow, so that a missing package shows at once.
    engine = RapidOCR()
    versions = {package: version(package) for package in PACKAGES}

    path = bundled_checkpoint(args.model) if args.model in BUNDLED else args.model
    pipeline = DnDPipeline.from_pretrained(path).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    figures = evaluate_words(pipeline, args.num_images_per_word, args.seed, args.batch_size, engine)

    on_gpu = torch.device(args.device).type == "cuda"
    results = {
        "settings": asdict(args),
        "sampling": pipeline.transformer.generation_config.to_diff_dict(),
        "figures": figures,
        "versions": {"python": platform.python_version(), "dnd_hf": __version__} | versions,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "gpu": torch.cuda.get_device_name(args.device) if on_gpu else None,
        },
    }
    output = Path(args.output_dir, "results.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")

    print(f"{figures['num_images']} generated and as many real pictures of words")
    print(f"read exactly   generated {figures['accuracy']:.3f}  real {figures['real_accuracy']:.3f}", end="  ")
    print(f"ratio {figures['accuracy_ratio']:.3f}")
    print(f"pixel spread   generated {figures['spread']:.4f}  real {figures['real_spread']:.4f}", end="  ")
    print(f"ratio {figures['spread_ratio']:.3f}")
    print(f"written to {output}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
