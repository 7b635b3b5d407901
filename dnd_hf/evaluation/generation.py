"""Samples for evaluation, each from its own label and seed, over any number of processes, and how good they are."""

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from dnd_hf.files import keep_settings, written_whole
from dnd_hf.pipelines.pipeline_dnd import DnDPipeline

from .features import (
    Features,
    GaussianStatistics,
    KnownStatistics,
    Statistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from .images import Failure, read_batches, to_levels


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
    if num_images < 1 or num_images % num_classes:
        raise ValueError(
            f"{num_images} pictures can not be divided equally among {num_classes} classes; choose a multiple, such as"
            f" {max(1, round(num_images / num_classes)) * num_classes}."
        )
    return num_classes


def sample_images(
    pipeline: DnDPipeline,
    folder: str | Path,
    num_images: int,
    seed: int = 0,
    batch_size: int = 32,
    sampling: Mapping[str, object] | None = None,
) -> list[Path]:
    """Makes `000000.png`, `000001.png`, ... in a folder, where they are not there already.

    Picture i has label `i % num_classes` and a CPU generator of its own, seeded `seed + i`, so it depends neither on
    the batch nor on the number of processes. Every process of `accelerate launch` calls this and makes its share; all
    return when all have finished. A stopped run goes on where it was; more pictures can be added later.

    Args:
        pipeline: on the device of this process.
        folder: of the pictures and `sampling.json`, which says how they were made.
        num_images: a multiple of the number of classes, so that labels are balanced exactly.
        seed: non-negative; seeds that differ by less than `num_images` share pictures' seeds.
        batch_size: pictures at once in each process, at least 1.
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
    sampling, folder = dict(sampling or {}), Path(folder)
    settings = {
        "weights": fingerprint(pipeline),
        "dtype": str(pipeline.transformer.dtype),
        "seed": seed,
        "sampling": sampling,
        "checkpoint_sampling": pipeline.transformer.generation_config.to_diff_dict(),
    }
    settings["checkpoint_sampling"].pop("transformers_version", None)
    settings_file = folder / "sampling.json"
    with state.main_process_first():
        if state.is_main_process or settings_file.exists():
            keep_settings(settings_file, settings, "samples of other settings")

    files = [folder / f"{i:06d}.png" for i in range(num_images)]
    mine = [i for i in range(state.process_index, num_images, state.num_processes) if not files[i].exists()]
    with tqdm(total=len(mine), desc="Sampling", unit=" pictures", disable=not state.is_main_process) as progress:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed + i) for i in batch]
            images = pipeline([i % num_classes for i in batch], generator=generators, **sampling).images
            for i, image in zip(batch, images, strict=True):
                with written_whole(files[i]) as unfinished:
                    image.save(unfinished, format="PNG")
            progress.update(len(batch))
    state.wait_for_everyone()
    return files


def write_npz(files: Sequence[str | Path], path: str | Path) -> None:
    """Writes pictures of one size as `arr_0`, uint8 (n, H, W, 3): the format of the ADM evaluation suite.

    One picture is in memory at a time. Raises ValueError for pictures of different sizes.
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


def extract_features(
    extractor: Callable[[Tensor], Features],
    dataset: Dataset,
    batch_size: int,
    failures: list[Failure],
    num_workers: int = 0,
    device: str | torch.device = "cpu",
) -> Features:
    """Features (and logits, where there are any) of all pictures, float32 on the CPU; broken ones go to `failures`."""
    batches = [
        extractor(to_levels(images).to(device))
        for _, images, _ in read_batches(dataset, batch_size, failures, num_workers, "Features")
    ]
    logits = None if batches[0].logits is None else torch.cat([batch.logits.cpu() for batch in batches])
    return Features(torch.cat([batch.features.cpu() for batch in batches]), logits)


def read_reference_statistics(path: str | Path) -> KnownStatistics | None:
    """`mu` and `sigma` of an ADM reference batch (`.npz`), Inception's of the whole data set; None without them."""
    with np.load(path) as arrays:
        if "mu" not in arrays or "sigma" not in arrays:
            return None
        return KnownStatistics(*(torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma")))


def gaussian(features: Tensor) -> GaussianStatistics:
    """The statistics of features (n, dim)."""
    statistics = GaussianStatistics()
    statistics.update(features)
    return statistics


def measure_samples(
    samples: Features,
    reference: Features | None,
    statistics: Statistics | None = None,
    device: str | torch.device = "cpu",
) -> dict:
    """FID, Inception Score, precision and recall of samples.

    Args:
        samples: of the generated pictures.
        reference: of the real ones; without them there is no precision and recall.
        statistics: of the real ones, for FID; those of `reference` where None.
        device: where distances are computed.

    Returns:
        `fid`; `inception_score` and its deviation `inception_score_std` (of ten parts; None without logits);
        `precision`, `recall` (None without `reference`); `num_images`.

    Raises:
        ValueError: neither `reference` nor `statistics`, too few pictures, or features of different networks.
    """
    if statistics is None:
        if reference is None:
            raise ValueError("FID needs features or statistics of real pictures.")
        statistics = gaussian(reference.features)
    score, deviation = (None, None) if samples.logits is None else inception_score(samples.logits)
    precision, recall = None, None
    if reference is not None:
        precision, recall = precision_recall(reference.features.to(device), samples.features.to(device))
    return {
        "fid": frechet_distance(gaussian(samples.features), statistics),
        "inception_score": score,
        "inception_score_std": deviation,
        "precision": precision,
        "recall": recall,
        "num_images": len(samples.features),
    }


def guidance_settings(
    scales: Sequence[float], schedules: Sequence[str] = ("constant",), powers: Sequence[float] = (2.75,)
) -> list[dict]:
    """All combinations, as options of the pipeline's call; only "power-cosine" has powers."""
    settings = []
    for schedule, scale in product(schedules, scales):
        setting = {"guidance_scale": scale, "guidance_schedule": schedule}
        if schedule == "power-cosine":
            settings += [{**setting, "guidance_power": power} for power in powers]
        else:
            settings.append(setting)
    return settings


def choose_presets(rows: Sequence[dict]) -> dict[str, dict]:
    """The two settings worth publishing from a search.

    Args:
        rows: dicts with `fid`, `precision` and the options of [`guidance_settings`].

    Returns:
        `fid`: the options with the lowest FID. `visual`: those with the highest precision (the share of pictures that
        look like real ones), the lower FID where several share it; guidance beyond the best FID trades variety for it.
    """
    best = {
        "fid": min(rows, key=lambda row: row["fid"]),
        "visual": min(rows, key=lambda row: (-row["precision"], row["fid"])),
    }
    names = ("guidance_scale", "guidance_schedule", "guidance_power")
    return {kind: {name: row[name] for name in names if row.get(name) is not None} for kind, row in best.items()}
