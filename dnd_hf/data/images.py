"""Image sources to tensors: any source of the `datasets` library, a local folder, or the rendered `words`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .words import WordImages


def as_size(resolution: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """`256`, `[256]` or `[height, width]` as (height, width), pixels. Raises ValueError for anything else."""
    sides = (resolution,) if isinstance(resolution, int) else tuple(resolution)
    if len(sides) not in (1, 2) or any(side < 1 for side in sides):
        raise ValueError(f"a size is one or two positive numbers, (height, width), got {resolution}.")
    return sides[0], sides[-1]


def check_stride(size: tuple[int, int], stride: tuple[int, int]) -> None:
    """Raises ValueError unless height and width are multiples of the tokenizer's (row, column) stride."""
    if size[0] % stride[0] or size[1] % stride[1]:
        raise ValueError(
            f"images of {size[0]} x {size[1]} pixels (height x width) do not divide into the tokenizer's cells of"
            f" {stride[0]} x {stride[1]} pixels; choose multiples of these."
        )


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as `(3, H, W)` float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """`(batch, 3, H, W)` floats, clamped to [-1, 1], as RGB pictures: the inverse of [`to_pixels`]."""
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def resize_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes with its proportions to the smallest picture that covers `size` (height, width); bicubic, antialiased."""
    scale = max(size[0] / image.height, size[1] / image.width)
    width, height = max(size[1], round(image.width * scale)), max(size[0], round(image.height * scale))
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


class ImageTransform:
    """Picture of any size and mode -> `(3, H, W)` float32 in [-1, 1].

    The picture is resized until it just covers `resolution`, cropped to it and perhaps mirrored. Random choices come
    from torch's global generator.

    Args:
        resolution: height and width of the result, pixels; one number for a square.
        crop: which part remains where the proportions differ.
        random_flip: mirror left and right in half of the cases; wrong for pictures of text.
    """

    def __init__(
        self,
        resolution: int | tuple[int, int],
        crop: Literal["center", "random"] = "center",
        random_flip: bool = False,
    ):
        if crop not in ("center", "random"):
            raise ValueError(f"`crop` must be 'center' or 'random', got {crop!r}.")
        self.resolution = as_size(resolution)
        self.crop, self.random_flip = crop, random_flip

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.resolution
        image = resize_to_cover(image.convert("RGB"), self.resolution)
        room = (image.height - height, image.width - width)
        if self.crop == "center":
            top, left = (space // 2 for space in room)
        else:
            top, left = (int(torch.randint(space + 1, ())) for space in room)
        image = image.crop((left, top, left + width, top + height))
        if self.random_flip and torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        return to_pixels(image)


class TenCrop:
    """Picture -> `(10, 3, H, W)` float32 in [-1, 1]: four corners, the center, and the mirror images of these five.

    The augmentation under which arXiv 2410.01912 extracts codes: the picture first covers `crop_range` times
    `resolution`.
    """

    def __init__(self, resolution: int | tuple[int, int], crop_range: float = 1.1):
        if crop_range < 1:
            raise ValueError(f"`crop_range` must be at least 1, got {crop_range}.")
        self.resolution, self.crop_range = as_size(resolution), crop_range

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.resolution
        image = resize_to_cover(image.convert("RGB"), (int(height * self.crop_range), int(width * self.crop_range)))
        bottom, right = image.height - height, image.width - width
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
        pixels = to_pixels(image)
        crops = torch.stack([pixels[:, top : top + height, left : left + width] for top, left in corners])
        return torch.cat([crops, crops.flip(-1)])


@dataclass
class ImageDataset(torch.utils.data.Dataset):
    """Map-style dataset of `{"pixel_values": transform(image), "label": int}` over a source of pictures.

    Args:
        source: indexable; items are dicts of a PIL picture and, where `label_column` is given, an int label.
        transform: [`ImageTransform`], [`TenCrop`] or another function of one picture.
        class_names: name of each label; without labels there is one class.
        image_column, label_column: keys of the source's items; `label_column=None`: every label is 0.
    """

    source: Any
    transform: Any
    class_names: list[str]
    image_column: str = "image"
    label_column: str | None = "label"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        item = self.source[index]
        image = ImageOps.exif_transpose(item[self.image_column])
        label = item[self.label_column] if self.label_column else 0
        return {"pixel_values": self.transform(image), "label": int(label)}


def load_image_dataset(
    name: str,
    transform: ImageTransform | TenCrop,
    split: str = "train",
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    num_images: int | None = None,
    seed: int = 0,
) -> ImageDataset:
    """Opens a source of labelled pictures.

    Args:
        name: `words` (rendered while training, [`WordImages`] at the transform's resolution), a data set on the Hub, a
            folder of pictures (one subfolder a class), of parquet files, or one written by `save_to_disk`.
        transform: what makes tensors of its pictures.
        split, config_name: as in `datasets.load_dataset`.
        image_column, label_column: its columns; labels may be integers or strings. A source without the label column
            has one class.
        num_images: how many `words` to render (default 100,000); of another source, how many to draw.
        seed: of the words, or of the draw.

    Raises:
        ValueError: no such column, no such split, or fewer than `num_images` pictures.
    """
    columns = {"image_column": image_column, "label_column": label_column}
    if name == "words":
        words = WordImages(num_images or 100_000, seed, *transform.resolution)
        return ImageDataset(words, transform, list(words.class_names))
    if Path(name, "dataset_info.json").exists():
        source = datasets.load_from_disk(name)
    else:
        source = datasets.load_dataset(name, config_name, split=split)
    if image_column not in source.column_names:
        raise ValueError(f"{name} has no column {image_column!r}; it has {source.column_names}.")
    if label_column not in source.column_names:
        columns["label_column"], class_names = None, ["image"]
    else:
        if source.features[label_column].dtype == "string":
            source = source.class_encode_column(label_column)
        feature = source.features[label_column]
        named = isinstance(feature, datasets.ClassLabel)
        class_names = feature.names if named else [str(i) for i in range(max(source.unique(label_column)) + 1)]
    source = source.cast_column(image_column, datasets.Image())
    if num_images is not None:
        if num_images > len(source):
            raise ValueError(f"{name} has {len(source)} pictures in {split!r}, fewer than the {num_images} asked for.")
        source = source.shuffle(seed=seed).select(range(num_images))
    return ImageDataset(source, transform, class_names, **columns)


def collate_images(items: list[dict]) -> dict[str, Tensor]:
    """Items of an [`ImageDataset`] to `pixel_values` `(batch, 3, H, W)` and `labels` `(batch,)` int64."""
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["label"] for item in items]),
    }
