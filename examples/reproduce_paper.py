# /// script
# requires-python = ">=3.11"
# dependencies = []  # --with says where dnd-hf is: see docs/reproduce.md
# ///
"""Reproduces the ImageNet results of arXiv 2410.01912 (Table 2) from the official files, on all GPUs of one machine.

uv run --with ".[eval,fid]" examples/reproduce_paper.py --checkpoint imagenet-xxl
uv run --with ".[eval,fid]" examples/reproduce_paper.py --checkpoint imagenet-xxxl --num_images 10000 --batch_size 128

It converts the official checkpoint, samples with the paper's guidance, measures FID, Inception Score, precision and
recall against the reference batch of the ADM suite, and writes the .npz for that suite's own program. What is there
already is not made again: a stopped run resumes. docs/reproduce.md has Hugging Face Jobs, and how long it takes.
"""

import os
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi, hf_hub_download
from transformers.hf_argparser import HfArg

from dnd_hf.command_line import run_script
from dnd_hf.conversion import convert_pipeline
from dnd_hf.evaluation import generation
from dnd_hf.figures import markdown_table
from dnd_hf.files import new_folder, written_whole


REFERENCE = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
METRICS = ("fid", "inception_score", "precision", "recall")


@dataclass(frozen=True)
class Published:
    """An official checkpoint: its folders on the Hub, the guidance of its best FID, and what the paper states then."""

    transformer: str
    rqvae: str
    guidance_scale: float
    fid: float
    inception_score: float
    precision: float
    recall: float


PUBLISHED = {
    "imagenet-xxl": Published(
        "trained_dnd_transformer_imagenet_2layer/XXL", "2d_tokenzier_imagenet", 2.0, 2.58, 295.6, 0.83, 0.56
    ),
    "imagenet-xxxl": Published(
        "trained_dnd_transformer_imagenet_2layer/XXXL", "2d_tokenzier_imagenet", 1.7, 2.21, 279.3, 0.83, 0.58
    ),
}


@dataclass
class ReproductionArguments:
    """Options of this script; they can also be in a YAML file given as `--config`."""

    checkpoint: Literal["imagenet-xxl", "imagenet-xxxl"] = HfArg(default="imagenet-xxl", help="What to reproduce.")
    repository: str = HfArg(default="leonardPKU/DnD-Transformer", help="Hub id of the official files.")
    transformer_checkpoint: str | None = HfArg(default=None, help="Official file, in the place of the Hub's.")
    rqvae_checkpoint: str | None = HfArg(default=None, help="Official file, with its config.yaml beside it; likewise.")
    output_dir: str | None = HfArg(default=None, help="Default: reproduce-CHECKPOINT.")
    num_images: int = HfArg(default=50_000, help="A multiple of the number of classes; the paper's is the default.")
    guidance_scale: float | None = HfArg(default=None, help="Default: that of the paper's best FID.")
    batch_size: int = HfArg(default=64, help="Images at once on each GPU; no metric depends on it.")
    seed: int = HfArg(default=0, help="Image i is generated from `seed + i`.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = HfArg(
        default=None, help="Precision of the transformer; default: bfloat16 on GPUs, float32 on CPUs."
    )
    reference: str = HfArg(default=REFERENCE, help="Reference batch of the ADM suite: a file, or where to download it.")
    feature_model: str | None = HfArg(
        default=None, help="Image model of transformers, in the place of the Inception that the paper's FID needs."
    )
    num_workers: int = HfArg(default=2, help="Processes that read images.")
    num_processes: int | None = HfArg(default=None, help="Default: one for each GPU.")

    def __post_init__(self):
        if (self.transformer_checkpoint is None) != (self.rqvae_checkpoint is None):
            raise ValueError("`transformer_checkpoint` and `rqvae_checkpoint` are given together, or neither.")
        if "://" not in self.reference and not Path(self.reference).is_file():
            raise ValueError(f"`reference` must be a file or an address, there is no file {self.reference}.")
        gpus = torch.cuda.device_count()
        self.output_dir = self.output_dir or f"reproduce-{self.checkpoint}"
        self.dtype = self.dtype or ("bfloat16" if gpus else "float32")
        self.num_processes = max(1, gpus) if self.num_processes is None else self.num_processes
        if self.guidance_scale is None:
            self.guidance_scale = PUBLISHED[self.checkpoint].guidance_scale
        if self.num_processes < 1:
            raise ValueError(f"`num_processes` must be positive, got {self.num_processes}.")
        generation.check(self.evaluation)

    @property
    def evaluation(self) -> generation.GenerationOptions:
        """The options of the task that samples and measures."""
        shared = {field.name for field in fields(self)} & {field.name for field in fields(generation.GenerationOptions)}
        given = {name: getattr(self, name) for name in shared - {"reference"}}
        return generation.GenerationOptions(
            model=[str(self.pipeline)], reference=str(self.local_reference), vqvae_dtype="float32", **given
        )

    @property
    def pipeline(self) -> Path:
        """The folder of the converted checkpoint."""
        return Path(self.output_dir, "pipeline")

    @property
    def local_reference(self) -> Path:
        """The file of the reference batch."""
        return Path(self.output_dir, "reference.npz") if "://" in self.reference else Path(self.reference)


def find_official_file(repository: str, folder: str) -> str:
    """Downloads the one checkpoint in a folder on the Hub, and the config.yaml beside it; returns its path here."""
    names = [name for name in HfApi().list_repo_files(repository) if name.startswith(f"{folder}/")]
    checkpoints = [name for name in names if name.endswith((".pt", ".pth"))]
    if len(checkpoints) != 1:
        raise ValueError(
            f"{repository} must have one checkpoint in {folder}, has {checkpoints or names}; download the right one and"
            " name it as `transformer_checkpoint` or `rqvae_checkpoint`."
        )
    if f"{folder}/config.yaml" in names:
        hf_hub_download(repository, f"{folder}/config.yaml")
    return hf_hub_download(repository, checkpoints[0])


def prepare(args: ReproductionArguments) -> None:
    """Converts the checkpoint and downloads the reference batch, where they are not there yet."""
    if not args.pipeline.exists():
        if args.transformer_checkpoint:
            files = args.transformer_checkpoint, args.rqvae_checkpoint
        else:
            official = PUBLISHED[args.checkpoint]
            files = [find_official_file(args.repository, name) for name in (official.transformer, official.rqvae)]
        with new_folder(args.pipeline) as folder:
            convert_pipeline(*files).save_pretrained(folder)
    if not args.local_reference.exists():
        with written_whole(args.local_reference) as file:
            torch.hub.download_url_to_file(args.reference, str(file))


def measure(args: ReproductionArguments) -> None:
    """Samples in this process and the others beside it, measures, and reports beside what the paper states."""
    options = args.evaluation
    generation.check(options)
    report = generation.run(options)
    if options.state.is_main_process:
        report.write(args.output_dir, f"Reproduction of {args.checkpoint}", asdict(args), options.run_device)
        ours, official = report.rows[0], asdict(PUBLISHED[args.checkpoint])
        paper = {"num_images": 50_000, "guidance": official["guidance_scale"], "features": "Inception of 2015"}
        here = {"num_images": args.num_images, "guidance": args.guidance_scale, "features": report.details["features"]}
        rows = [
            {"": "here", **here, **{name: ours[name] for name in METRICS}},
            {"": "paper", **paper, **{name: official[name] for name in METRICS}},
        ]
        print(f"\n{markdown_table(rows)}\n")
        if here["num_images"] != paper["num_images"] or args.feature_model or here["guidance"] != paper["guidance"]:
            print("The settings differ: these numbers cannot be compared with the paper's.")
        print(f"For the ADM suite's own program: {options.sample_path(options.model[0], '.npz')}")
    options.state.wait_for_everyone()
    options.state.destroy_process_group()


def main(args: ReproductionArguments) -> None:
    launched = "LOCAL_RANK" in os.environ
    if not launched:
        prepare(args)
    if launched or args.num_processes == 1:
        measure(args)
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.num_processes)]
        sys.exit(subprocess.run([sys.executable, *launcher, __file__, *sys.argv[1:]]).returncode)


if __name__ == "__main__":
    run_script(main, ReproductionArguments)
