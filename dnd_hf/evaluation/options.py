"""Options that several tasks share (models, real images, OCR engine, samples), and loading what they name.

The options of a task are a dataclass made of these. A script shows them as its command line, with their help.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from ..arguments import SamplingArguments
from ..bundled import checkpoint_path
from ..command_line import loading
from ..data.images import ImageDataset, ImageTransform, check_stride
from ..data.rgb import parse_background
from ..data.sources import load_image_dataset
from ..generation.settings import SamplingSettings
from ..models.autoencoder_rqvae import RQVAE
from ..ops.number_checks import height_width
from ..pipelines.pipeline_dnd import DnDPipeline
from .features import InceptionFeatures, ModelFeatures
from .images import SampleImages
from .ocr import OCREngine, load_ocr_engine
from .sampling import check_balance, sample_images


REAL_SEED = 1_000_000
"""Real words are rendered with `seed=REAL_SEED + seed`; training keeps to smaller seeds, so they are unseen."""


def option(default: Any, help: str) -> Any:
    """A field of a dataclass with a help text, as `HfArg`, but in a type that may stand for any default."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TaskOptions:
    """What every task needs. Options without a value are filled in, or asked for, by the check of the task."""

    model: list[str] = option(
        [],
        "Pipelines (folders, Hub ids, or `words`: the bundled one); for rocr and reconstruction tokenizers too."
        " Several, such as the checkpoints of a run, are compared.",
    )
    output_dir: str = option(None, "Folder of the results; made where missing.")
    seed: int = option(0, "Image i is generated from `seed + i`; also of the real images drawn, and so on.")
    batch_size: int = option(
        None, "Images at once in each process, default 32 (`words`: 100); no metric depends on it."
    )
    num_workers: int = option(2, "Processes that read images.")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "Where the models run.")

    def check_task(self, task: str, max_models: int | None = None, default_batch_size: int = 32) -> None:
        """Fills in the batch size. Raises ValueError for an option that is missing or out of its range."""
        if self.output_dir is None:
            raise ValueError("`output_dir` is needed.")
        samples = getattr(self, "samples", None)
        if not self.model and not samples:
            raise ValueError("`model` is needed" + ("." if samples is None else ", or `samples`."))
        if max_models is not None and len(self.model) > max_models:
            raise ValueError(f"the task {task} takes {max_models} `model`, got {len(self.model)}.")
        names = [*self.model, *(samples or [])]
        if len(set(names)) < len(names):
            raise ValueError("`model` or `samples` names one twice.")
        self.batch_size = default_batch_size if self.batch_size is None else self.batch_size
        check_ranges(self, least={"batch_size": 1, "seed": 0, "num_workers": 0})

    @cached_property
    def state(self) -> PartialState:
        """The processes of this run."""
        # While one process measures the others wait, longer than for a connection that is broken.
        return PartialState(cpu=torch.device(self.device).type == "cpu", timeout=timedelta(days=7))

    @property
    def run_device(self) -> str | torch.device:
        """The device of this process."""
        return self.device if self.state.num_processes == 1 else self.state.device

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.output_dir)


@dataclass
class RealImageOptions(TaskOptions):
    """Where the real images come from."""

    dataset_name: str = option(
        None, "The real images: `words`, a data set on the Hub or saved, a folder, or a parquet file."
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set on the Hub.")
    dataset_split: str = option("train", "Split of the data set.")
    image_column: str = option("image", "Column of the images.")
    text_column: str | None = option(
        None, "Column of the true text; default: what the OCR engine reads from the original counts."
    )
    background: str = option("white", "Behind transparent real images: white, black or #RRGGBB.")
    num_dataset_images: int | None = option(None, "How many of them to draw; default: all, of `words` 1,000.")
    sample_size: list[int] | None = option(None, "Their height and width; default: the model's.")

    def check_real_images(self, task: str | None = None) -> None:
        """Raises ValueError for an option out of its range; with `task`, also where no data set is named."""
        if task is not None and self.dataset_name is None:
            raise ValueError(f"`dataset_name` is needed: the real images that {task} measures.")
        check_ranges(self, least={"num_dataset_images": 1})
        parse_background(self.background)
        if self.sample_size is not None:
            height_width("sample_size", self.sample_size)

    def load_dataset(self, size: tuple[int, int]) -> ImageDataset:
        """The real images at (height, width); their labels stand for their texts."""
        words = self.dataset_name == "words"
        dataset = load_image_dataset(
            self.dataset_name,
            ImageTransform(size, background=self.background),
            self.dataset_split,
            self.dataset_config_name,
            self.image_column,
            self.text_column,
            self.num_dataset_images or (1000 if words else None),
            REAL_SEED + self.seed if words else self.seed,
        )
        assert isinstance(dataset, ImageDataset)  # only `streaming` gives another class
        return dataset

    @property
    def texts_known(self) -> bool:
        """Whether the labels of the real images are their texts."""
        return bool(self.text_column) or self.dataset_name == "words"

    def size_for(self, vae: RQVAE) -> tuple[int, int]:
        """The (height, width) of the images that a tokenizer takes. ValueError if its stride does not divide it."""
        size = height_width("sample_size", self.sample_size or vae.config.sample_size)
        check_stride(size, vae.code_stride)
        return size

    def size_beside(self, pipelines: Mapping[str, DnDPipeline], samples: Mapping[str, SampleImages]) -> tuple[int, int]:
        """The (height, width) of real images to be compared with those of the first pipeline, or the first samples."""
        for pipeline in pipelines.values():
            return self.size_for(pipeline.vqvae)
        return height_width(
            "sample_size", self.sample_size or next(iter(samples.values()))[0]["pixel_values"].shape[1:]
        )


@dataclass
class OCROptions(TaskOptions):
    """What reads texts."""

    ocr: str | None = option(
        None,
        "rapidocr (pages), rapidocr-line (single lines), tesseract, or an image-text-to-text model of"
        " transformers; default: rapidocr, for `words` rapidocr-line.",
    )
    ocr_prompt: str | None = option(None, "What such a model is asked; default: for all text, in reading order.")
    ocr_language: str = option("eng", "Of Tesseract.")
    ocr_threads: int = option(1, "CPU threads of rapidocr.")
    ocr_device: str | None = option(
        None, "Where such a model runs; `auto`: spread over all GPUs; default: where the other models run."
    )

    def check_ocr(self) -> None:
        """Raises ValueError for an option out of its range."""
        check_ranges(self, least={"ocr_threads": 1})

    def load_engine(self, default: str) -> OCREngine:
        """The engine that the options name, or else `default`."""
        device = self.ocr_device or self.run_device
        return load_ocr_engine(self.ocr or default, self.ocr_prompt, self.ocr_language, device, self.ocr_threads)


@dataclass
class PipelineOptions(TaskOptions, SamplingArguments):
    """How pipelines generate."""

    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the pipelines.")
    vqvae_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "Precision of their tokenizers; default: that of the pipelines."
    )

    def check_sampling(self) -> None:
        """Raises ValueError for sampling options out of their range, before a model is loaded."""
        SamplingSettings.check(**self.sampling)

    def load_pipeline(self, name: str) -> DnDPipeline:
        """A pipeline on the device of this process."""
        dtypes = {"transformer": getattr(torch, self.dtype), "vqvae": getattr(torch, self.vqvae_dtype or self.dtype)}
        with loading(name):
            pipeline = DnDPipeline.from_pretrained(checkpoint_path(name), dtype=dtypes)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.run_device)


@dataclass
class SamplesOptions(PipelineOptions, RealImageOptions):
    """Generated images, by pipelines here or by other programs, to be compared with real ones."""

    samples: list[str] = option(
        [], "For generation and ppl_ocr: folders of images, or .npz files, that some other program has made."
    )
    num_images: int = option(
        None, "Images generated, and read of `samples`; default: 50,000 for generation, 1,000 for ppl_ocr."
    )

    def check_samples(self, default_num_images: int) -> None:
        """Fills in the number of images. Raises ValueError where it is out of its range."""
        if self.num_images is None and self.model:
            self.num_images = default_num_images
        check_ranges(self, least={"num_images": 1})

    def open_samples(self) -> dict[str, SampleImages]:
        """The images of other programs, by their names. ValueError where there are none or too few."""
        return {name: SampleImages(name, self.num_images) for name in self.samples}

    def load_pipelines(self) -> dict[str, DnDPipeline]:
        """The pipelines, by their names. ValueError where the images cannot be divided equally among the classes."""
        pipelines = {name: self.load_pipeline(name) for name in self.model}
        for pipeline in pipelines.values():
            check_balance(pipeline, self.num_images)
        return pipelines

    def sample(self, name: str, pipeline: DnDPipeline, sampling: Mapping[str, Any] | None = None) -> list[Path]:
        """The files of the images that a pipeline generates; every process makes its share."""
        sampling = self.sampling if sampling is None else sampling
        return sample_images(pipeline, self.sample_path(name), self.num_images, self.seed, self.batch_size, sampling)

    def sample_path(self, model: str, suffix: str = "") -> Path:
        """The folder of a model's samples, or a file beside it."""
        return self.folder / "samples" / (re.sub(r"[^\w.-]+", "-", model).strip("-") + suffix)


@dataclass
class FeatureOptions(TaskOptions):
    """The features that FID compares images by."""

    feature_model: str | None = option(
        None, "Image model of transformers whose features FID compares; default: the standard Inception."
    )
    inception_weights: str | None = option(
        None, "File of Inception's weights in torch-fidelity's format; default: it downloads them."
    )

    def load_feature_extractor(self) -> InceptionFeatures | ModelFeatures:
        """What computes the features, on the device of this process."""
        if self.feature_model:
            return ModelFeatures(self.feature_model).to(self.run_device)
        return InceptionFeatures(self.inception_weights).to(self.run_device)


def check_ranges(options: Any, least: Mapping[str, float]) -> None:
    """Raises ValueError for an option below its least value; None is any option's default."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            condition = "must be positive" if bound == 1 else f"must be at least {bound}"
            raise ValueError(f"`{name}` {condition}, got {value}.")
