# /// script
# requires-python = ">=3.11"
# dependencies = ["dnd-hf[text]"]
#
# [tool.uv.sources]
# dnd-hf = { path = "..", editable = true }
# ///
"""Turns images into a dataset of codes, so that training the transformer need not run the tokenizer.

python examples/extract_codes.py --dataset_name words --num_train_images 50000 --vqvae rqvae-words --output_dir codes
accelerate launch examples/extract_codes.py --dataset_name photos --ten_crop --vqvae rqvae --output_dir codes-photos

The same command continues where the last one was stopped, however it was. In the end every image is there exactly once,
in the order of the source, except for broken ones, which `broken_images.jsonl` lists. Codes are computed in float32,
whatever the hardware prefers, because rounding changes them; on CPUs image by image, which is the fastest.
"""

import os


if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("Loading the libraries ...", flush=True)

import logging
import shlex
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import disable_progress_bars
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE
from dnd_hf.arguments import ImageArguments
from dnd_hf.command_line import loading, run_script
from dnd_hf.data.codes import MAX_VOCAB_SIZE, CodesWriter, Rows, ShardReader, codes_features
from dnd_hf.data.images import (
    BrokenImageError,
    ImageDataset,
    ImageStream,
    ImageTransform,
    TenCrop,
    WithMirrorImage,
    check_broken_share,
    check_stride,
)
from dnd_hf.files import read_json
from dnd_hf.messages import counted
from dnd_hf.ops.memory import kept_memory
from dnd_hf.ops.number_checks import height_width
from dnd_hf.processes import connected, end_processes
from dnd_hf.training.settings import fingerprint, model_settings


logger = logging.getLogger(__name__)

DATA_OPTIONS = (
    "dataset_name",
    "dataset_config_name",
    "dataset_split",
    "image_column",
    "label_column",
    "num_train_images",
    "streaming",
    "seed",
    "ten_crop",
    "with_mirror_image",
    "crop_range",
    "background",
    "shard_size",
)
"""Options that decide which rows there are; an extraction continues only if all of them are the same."""

PRESUMED_STREAM_LENGTH = 10_000
"""Until more of a stream's images, or all, have been read, broken ones are judged as a share of this many."""


@dataclass
class ExtractionArguments(ImageArguments):
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    vqvae: str | None = HfArg(default=None, help="The tokenizer: a folder or a Hub id.")
    output_dir: str | None = HfArg(default=None, help="Folder of the codes and a copy of the tokenizer.")
    caption_column: str | None = HfArg(default=None, help="Column of texts that describe the images, which are kept.")
    sample_size: list[int] | None = HfArg(default=None, help="Height and width in pixels; default: the tokenizer's.")
    ten_crop: bool = HfArg(
        default=False, help="Ten rows for each image: four corners, the center, and their mirror images; not for text."
    )
    with_mirror_image: bool = HfArg(
        default=False, help="Two rows for each image, one mirrored; --ten_crop has them already."
    )
    crop_range: float | None = HfArg(
        default=None,
        help="Images first cover this many times their size, then are cropped; default: 1.1 with --ten_crop, else 1.",
    )
    batch_size: int = HfArg(
        default=64, help="Images, counting crops, that are read at once; on GPUs also those of a forward pass."
    )
    shard_size: int = HfArg(
        default=1024, help="Images in a file of codes; a stop loses what is unfinished: one file for each worker."
    )

    def __post_init__(self):
        for name in ("dataset_name", "vqvae", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is needed.")
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}.")
        if self.ten_crop and self.with_mirror_image:
            raise ValueError("--ten_crop has the mirror images already: leave --with_mirror_image out.")
        self.check_images(streamable=True)
        if self.crop_range is None:
            self.crop_range = 1.1 if self.ten_crop else 1.0
        folder = Path(self.output_dir)
        if (folder / "dataset_info.json").exists() and not (folder / "extraction.json").exists():
            raise ValueError(f"--output_dir {self.output_dir} holds another data set.")

    @property
    def num_crops(self) -> int:
        """Rows for each image."""
        return 10 if self.ten_crop else 2 if self.with_mirror_image else 1

    def transform(self, size: tuple[int, int]) -> ImageTransform | WithMirrorImage | TenCrop:
        """What makes one or more crops of `size` of an image."""
        if self.ten_crop:
            return TenCrop(size, self.crop_range, self.background)
        transform = ImageTransform(size, crop_range=self.crop_range, background=self.background)
        return WithMirrorImage(transform) if self.with_mirror_image else transform


@torch.inference_mode()
def encode(vae: RQVAE, batch: dict) -> Rows:
    """Codes, labels, image indices and perhaps captions of a batch; several crops of an image become several rows."""
    pixels, labels, image_index = batch["pixel_values"], batch["labels"], batch["image_index"]
    crops = pixels.shape[1] if pixels.ndim == 5 else 1
    codes = vae.encode(pixels.view(-1, *pixels.shape[-3:]).to(vae.device, non_blocking=True)).codes
    rows = codes.int().cpu(), labels.repeat_interleave(crops), image_index.repeat_interleave(crops)
    return *rows, *([[text for text in batch["captions"] for _ in range(crops)]] if "captions" in batch else [])


def check_broken(shards: dict, num_images: int, max_broken_share: float) -> tuple[int, int]:
    """Images of the shards, and how many are broken; RuntimeError for more than a share of these or `num_images`."""
    seen = sum(note["num_images"] for note in shards.values())
    broken = [image for note in shards.values() for image in note["broken"]]
    if broken:
        example = str(BrokenImageError(**broken[-1]))
        check_broken_share(len(broken), max(seen, num_images), max_broken_share, example)
    return seen, len(broken)


def extract(args: ExtractionArguments, vae: RQVAE, dataset: ImageDataset | ImageStream, writer: CodesWriter) -> None:
    """Writes the shards that are missing, each process its own."""
    state = PartialState()
    num_images = len(dataset) if isinstance(dataset, ImageDataset) else PRESUMED_STREAM_LENGTH
    (shards,) = broadcast_object_list([writer.shards()])
    missing = dict.fromkeys(range(dataset.num_parts(args.shard_size)), 0)
    for (part, shard), note in shards.items():
        missing[part] = None if note["last"] else shard + 1
    parts = [(part, shard) for part, shard in missing.items() if shard is not None]
    parts = parts[state.process_index :: state.num_processes]

    loader = DataLoader(
        ShardReader(dataset, parts, args.shard_size, max(1, args.batch_size // args.num_crops)),
        batch_size=None,
        num_workers=min(args.dataloader_num_workers, len(parts)),
        pin_memory=state.device.type == "cuda",
    )
    rows, broken = defaultdict(list), defaultdict(list)
    total = None
    if isinstance(dataset, ImageDataset):  # its parts are single shards
        total = sum(min(args.shard_size, len(dataset) - part * args.shard_size) for part, _ in parts)
    label = f"process 1 of {state.num_processes}" if state.num_processes > 1 else None
    progress = tqdm(desc=label, total=total, unit=" images", disable=not state.is_main_process)
    for batch in loader:
        part = batch["part"]
        if "shard" in batch:
            note = writer.write(part, batch["shard"], batch["last"], rows.pop(part, []), broken.pop(part, []))
            shards[part, batch["shard"]] = note
            check_broken(shards, num_images, args.max_broken_share)
            continue
        for image in batch["broken"]:
            logger.warning("%s; it is left out.", BrokenImageError(**image))
        broken[part] += batch["broken"]
        progress.update(len(batch["broken"]))
        if "labels" in batch:
            rows[part].append(encode(vae, batch))
            progress.update(len(batch["labels"]))
    progress.close()

    state.wait_for_everyone()
    if state.is_main_process:
        seen, num_broken = check_broken(writer.shards(), 0, args.max_broken_share)
        if seen == num_broken:
            raise ValueError(f"{args.dataset_name} has no images.")
        disable_progress_bars()  # of the library that writes the data set, whose work is done
        vae.save_pretrained(writer.path / "vqvae")
        writer.finish()
        print(
            f"Saved the codes of {counted(seen - num_broken, 'image')} to {args.output_dir}; left out as broken:"
            f" {num_broken:,}. Next: python examples/train.py --codes_dir {shlex.quote(args.output_dir)} --output_dir"
            " dnd"
        )


def main(args: ExtractionArguments) -> None:
    # At the end processes wait for the slowest, longer than for a connection that is broken.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    torch.backends.cudnn.allow_tf32 = False
    with loading(args.vqvae):
        vae = RQVAE.from_pretrained(args.vqvae).to(state.device).eval()
    on_cpu = state.device.type == "cpu"
    vae.use_slicing = on_cpu
    if vae.config.num_vq_embeddings > MAX_VOCAB_SIZE:
        raise ValueError(f"codes are stored in 16 bits; the codebook has {vae.config.num_vq_embeddings} entries.")
    size = height_width("sample_size", args.sample_size or vae.config.sample_size)
    check_stride(size, vae.code_stride)
    dataset = args.load_images(args.transform(size), args.caption_column)

    shape = (size[0] // vae.code_stride[0], size[1] // vae.code_stride[1], vae.config.code_depth)
    settings = {name: getattr(args, name) for name in DATA_OPTIONS} | {
        "sample_size": size,
        "num_images": len(dataset) if isinstance(dataset, ImageDataset) else None,
        "num_parts": dataset.num_parts(args.shard_size),
        "class_names": dataset.class_names,
        "files_digest": dataset.files_digest,
        "vqvae": fingerprint(vae),
        "vqvae_config": model_settings(vae),
    }
    if args.caption_column is not None:
        settings["caption_column"] = args.caption_column
    record = Path(args.output_dir, "extraction.json")
    for name, what in (("vqvae_config", "the tokenizer's configuration"), ("files_digest", "the names of the files")):
        if record.is_file() and name not in read_json(record):
            del settings[name]
            if state.is_main_process:
                print(f"{record} does not record {what}: not compared.")
    with connected(lambda: "What is written stays: start all processes again with the same command."):
        with state.main_process_first():
            features = codes_features(shape, dataset.class_names, args.caption_column is not None)
            writer = CodesWriter(args.output_dir, features, settings)
        if writer.is_complete:
            if state.is_main_process:
                print(f"{args.output_dir} is complete already.")
        else:
            with kept_memory() if on_cpu else nullcontext():
                extract(args, vae, dataset, writer)
        end_processes()


if __name__ == "__main__":
    run_script(main, ExtractionArguments)
