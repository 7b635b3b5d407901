"""Samples for evaluation: each image from its own label and seed, over any number of processes."""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from ..files import keep_settings, written_whole
from ..pipelines.pipeline_dnd import DnDPipeline


def fingerprint(pipeline: DnDPipeline) -> str:
    """A hash of the names and the byte sums of all weights: another checkpoint has another one."""
    digest = hashlib.sha256()
    for model in (pipeline.transformer, pipeline.vqvae):
        for name, tensor in sorted(model.state_dict().items()):
            total = tensor.contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{total.item()}".encode())
    return digest.hexdigest()


def check_balance(pipeline: DnDPipeline, num_images: int) -> int:
    """The number of classes; ValueError unless `num_images` can be divided equally among them."""
    num_classes = pipeline.transformer.config.num_classes
    if not num_classes:
        raise ValueError("`model` must be a class-conditional or unconditional pipeline, this one reads prompts.")
    if num_images < 1 or num_images % num_classes:
        raise ValueError(
            f"{num_images} images cannot be divided equally among {num_classes} classes; choose a multiple, such as"
            f" {max(1, round(num_images / num_classes)) * num_classes}."
        )
    return num_classes


def sample_images(
    pipeline: DnDPipeline,
    folder: str | Path,
    num_images: int,
    seed: int = 0,
    batch_size: int = 32,
    sampling: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Makes `000000.png`, `000001.png`, ... in a folder, where they are not there already.

    Image i has label `i % num_classes` and a CPU generator of its own, seeded `seed + i`, so it depends neither on
    the batch nor on the number of processes. Every process of `accelerate launch` calls this and makes its share; all
    return when all have finished. A stopped run resumes where it was; more images can be added later.

    Args:
        pipeline: on the device of this process.
        folder: of the images and `sampling.json`, which says how they were made.
        num_images: a multiple of the number of classes, so that labels are balanced exactly.
        seed: non-negative; seeds that differ by less than `num_images` share images' seeds.
        batch_size: images at once in each process, at least 1.
        sampling: options of the pipeline's call, such as `guidance_scale`; what it leaves out is the checkpoint's own.

    Returns:
        The files, in order.

    Raises:
        ValueError: an argument out of its range; or the folder holds samples made otherwise.
    """
    state = PartialState()
    num_classes = check_balance(pipeline, num_images)
    if seed < 0 or batch_size < 1:
        raise ValueError(f"the seed must not be negative and the batch size be positive, got {seed} and {batch_size}.")
    options: dict[str, Any] = dict(sampling or {})
    folder = Path(folder)
    settings = {
        "weights": fingerprint(pipeline),
        "dtype": str(pipeline.transformer.dtype),
        "seed": seed,
        "sampling": options,
        "checkpoint_sampling": pipeline.transformer.generation_config.to_diff_dict(),
    }
    settings["checkpoint_sampling"].pop("transformers_version", None)
    settings_file = folder / "sampling.json"
    with state.main_process_first():
        if state.is_main_process or settings_file.exists():
            keep_settings(settings_file, settings, "samples of other settings")

    files = [folder / f"{i:06d}.png" for i in range(num_images)]
    mine = [i for i in range(state.process_index, num_images, state.num_processes) if not files[i].exists()]
    with tqdm(total=len(mine), desc="Sampling", unit=" images", disable=not state.is_main_process) as progress:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed + i) for i in batch]
            labels = [i % num_classes for i in batch]
            (images,) = pipeline(labels, generator=generators, **options, return_dict=False)
            for i, image in zip(batch, images, strict=True):
                with written_whole(files[i]) as unfinished:
                    image.save(unfinished, format="PNG")
            progress.update(len(batch))
    state.wait_for_everyone()
    return files


def write_npz(files: Sequence[str | Path], path: str | Path) -> None:
    """Writes images of one size as `arr_0`, uint8 (n, H, W, 3): the format of the ADM evaluation suite.

    One image is in memory at a time. Raises ValueError for images of different sizes.
    """
    width, height = Image.open(files[0]).size
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), height, width, 3)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
        np.lib.format.write_array_header_1_0(array, header)
        for file in files:
            pixels = np.asarray(Image.open(file).convert("RGB"))
            if pixels.shape != (height, width, 3):
                raise ValueError(f"{file} is of {pixels.shape[1::-1]} pixels, {files[0]} of {(width, height)}.")
            array.write(pixels.tobytes())
