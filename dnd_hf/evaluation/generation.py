"""How good generated images are: FID, Inception Score, precision and recall, and the guidance that gives the best."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor

from ..figures import save_image_grid
from ..files import write_json
from ..generation.guidance import GUIDANCE_SCHEDULES
from ..pipelines.pipeline_dnd import DnDPipeline
from .features import (
    NEIGHBOURS,
    Features,
    GaussianStatistics,
    KnownStatistics,
    Statistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from .images import Failure, ImageItems, SampleImages, read_batches, to_levels
from .options import FeatureOptions, SamplesOptions, check_ranges, option
from .reports import Report
from .sampling import check_balance, sample_images, write_npz


SETTING_NAMES = ("guidance_scale", "guidance_schedule", "guidance_power")


@dataclass
class GenerationOptions(SamplesOptions, FeatureOptions):
    """Options of the task generation."""

    reference: str | None = option(
        None, "Reference batch of the ADM suite (.npz) for generation, in the place of `dataset_name`."
    )
    npz: bool = option(True, "Also write the generated images as the .npz that the ADM suite takes.")
    search_scales: list[float] = option(
        [], "Guidance scales to try before; the samples then have the one of the lowest FID."
    )
    search_schedules: list[str] = option(["constant"], "Guidance schedules to try.")
    search_powers: list[float] = option([2.75], "Powers of power-cosine to try.")
    num_search_images: int = option(5000, "Images of each setting tried.")


def check(options: GenerationOptions) -> None:
    """Fills in the task's defaults. Raises ValueError for options that cannot work, before anything is loaded."""
    options.check_task("generation")
    options.check_real_images()
    options.check_samples(default_num_images=50_000)
    if (options.dataset_name is None) == (options.reference is None):
        raise ValueError("either `dataset_name` or `reference` is needed: the real images.")
    if options.search_scales and len(options.model) != 1:
        raise ValueError(f"`search_scales` goes with one `model`, got {len(options.model)}.")
    if not set(options.search_schedules) <= set(GUIDANCE_SCHEDULES):
        raise ValueError(f"`search_schedules` must be of {', '.join(GUIDANCE_SCHEDULES)}.")
    if min([*options.search_scales, 0]) < 0:
        raise ValueError(f"`search_scales` must not be negative, got {options.search_scales}.")
    if min(options.search_powers) <= 0:
        raise ValueError(f"`search_powers` must be positive, got {options.search_powers}.")
    options.check_sampling()
    check_ranges(options, least={"num_search_images": 1})


def run(options: GenerationOptions) -> Report:
    """The metrics of `samples` and of what each `model` generates; all processes generate, the main one measures.

    With `search_scales` the guidance is chosen first. Beside the results there are the images, grids of the first ones,
    .npz files, and presets.json of a search.
    """
    main_process, report = options.state.is_main_process, Report()
    samples, pipelines = options.open_samples(), options.load_pipelines()
    if options.search_scales:
        check_balance(next(iter(pipelines.values())), options.num_search_images)
    measure = _Measurement(options, pipelines, samples, report) if main_process else None
    sampling = options.sampling
    if options.search_scales:
        sampling |= search_guidance(options, next(iter(pipelines.items())), measure, report)
    for name, pipeline in pipelines.items():
        files = options.sample(name, pipeline, sampling)
        samples[name] = SampleImages(files[0].parent, len(files))
        if main_process:
            grid = options.sample_path(name, ".png")
            save_first_images(files[:64], grid)
            report.images[str(grid.relative_to(options.folder))] = f"{name}: the first samples"
            if options.npz:
                write_npz(files, options.sample_path(name, ".npz"))
    if measure:
        report.rows = [measure(name, dataset) for name, dataset in samples.items()]
    report.details["sampling"] = sampling
    return report


def search_guidance(
    options: GenerationOptions,
    named_pipeline: tuple[str, DnDPipeline],
    measure: Callable[[str, ImageItems], dict] | None,
    report: Report,
) -> dict[str, Any]:
    """The guidance of the lowest FID among those to try, as options of the pipeline's call; the same in every process.

    `measure` is that of the main process, None in others. Each setting leaves its images and a grid under `search/`.
    """
    name, pipeline = named_pipeline
    rows, folder = [], options.folder / "search"
    for setting in guidance_settings(options.search_scales, options.search_schedules, options.search_powers):
        key = _file_name(setting)
        files = sample_images(
            pipeline,
            folder / key,
            options.num_search_images,
            options.seed,
            options.batch_size,
            {**options.sampling, **setting},
        )
        if measure:
            rows.append({**setting, **measure(f"{name} {key}", SampleImages(files[0].parent, len(files)))})
            save_first_images(files[:16], folder / f"{key}.png")
    presets = choose_presets(rows) if measure else None
    if presets:
        report.details |= {"search": rows, "presets": presets}
        write_json(options.folder / "presets.json", presets)
        columns = [*SETTING_NAMES, "fid", "inception_score", "precision", "recall", "num_images"]
        report.tables["Guidance"] = [{name: row.get(name) for name in columns} for row in rows]
        for kind, preset in presets.items():
            file = f"search/{_file_name(preset)}.png"
            caption = f"preset `{kind}`: {', '.join(f'{name} {value}' for name, value in preset.items())}"
            report.images[file] = f"{report.images[file]}; {caption}" if file in report.images else caption
    (best,) = broadcast_object_list([presets["fid"] if presets else None])
    return best


def _file_name(setting: Mapping[str, Any]) -> str:
    return "-".join(str(value) for value in setting.values())


def save_first_images(files: Sequence[str | Path], path: str | Path) -> None:
    """Writes the images of some files, of one size, as a grid of eight columns."""
    save_image_grid([Image.open(file).convert("RGB") for file in files], 8, path)


class _Measurement:
    """Measures samples against the real images that the options name, whose features it computes first.

    Call with a name and a dataset of samples; returns the row of results. Broken images go to the report.
    """

    def __init__(
        self,
        options: GenerationOptions,
        pipelines: Mapping[str, DnDPipeline],
        samples: Mapping[str, SampleImages],
        report: Report,
    ):
        self.options, self.report = options, report
        self.extractor = options.load_feature_extractor()
        self.statistics: Statistics | None = None
        dataset: ImageItems | None = None
        if options.reference:
            if options.feature_model is None:
                self.statistics = read_reference_statistics(options.reference)
            try:
                dataset = SampleImages(options.reference)
            except ValueError:  # a reference of statistics without images does for FID, not for a search
                if self.statistics is None or options.search_scales:
                    raise
        else:
            dataset = options.load_dataset(options.size_beside(pipelines, samples))
        self.reference = self.extract("real", dataset) if dataset else None
        if self.reference and len(self.reference.features) <= NEIGHBOURS:
            raise ValueError(
                f"precision and recall need more than {NEIGHBOURS} real images, got {len(self.reference.features)}."
            )
        if self.statistics is None and self.reference:
            self.statistics = gaussian(self.reference.features)
        num_real_images = len(self.reference.features) if self.reference else None
        report.details |= {"features": self.extractor.name, "num_real_images": num_real_images}

    def extract(self, name: str, dataset: ImageItems) -> Features:
        """The features of images; broken ones go to the report."""
        options = self.options
        failures: list[Failure] = []
        features = extract_features(
            self.extractor, dataset, options.batch_size, failures, options.num_workers, options.run_device
        )
        self.report.add_failures(name, failures)
        return features

    def __call__(self, name: str, dataset: ImageItems) -> dict:
        features = self.extract(name, dataset)
        return {
            "model": name,
            **measure_samples(features, self.reference, self.statistics, self.options.run_device),
        }


def extract_features(
    extractor: Callable[[Tensor], Features],
    dataset: ImageItems,
    batch_size: int,
    failures: list[Failure],
    num_workers: int = 0,
    device: str | torch.device = "cpu",
) -> Features:
    """Features (and logits, where there are any) of all images, float32 on the CPU; broken ones go to `failures`."""
    batches = [
        extractor(to_levels(images).to(device))
        for _, images, _ in read_batches(dataset, batch_size, failures, num_workers, "Features")
    ]
    parts = [batch.logits.cpu() for batch in batches if batch.logits is not None]
    logits = torch.cat(parts) if parts else None
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
        samples: of the generated images.
        reference: of the real ones; without them there is no precision and recall.
        statistics: of the real ones, for FID; those of `reference` where None.
        device: where distances are computed.

    Returns:
        `fid`; `inception_score` and its deviation `inception_score_std` (of ten parts; None without logits);
        `precision`, `recall` (None without `reference`); `num_images`.

    Raises:
        ValueError: neither `reference` nor `statistics`, too few images, or features of different networks.
    """
    if statistics is None:
        if reference is None:
            raise ValueError("FID needs features or statistics of real images.")
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
        `fid`: the options with the lowest FID. `visual`: those with the highest precision (the share of images that
        look like real ones), the lower FID where several share it; guidance beyond the best FID trades variety for it.
    """
    best = {
        "fid": min(rows, key=lambda row: row["fid"]),
        "visual": min(rows, key=lambda row: (-row["precision"], row["fid"])),
    }
    return {
        kind: {name: row[name] for name in SETTING_NAMES if row.get(name) is not None} for kind, row in best.items()
    }
