"""Images to tensors and back, and datasets of labelled images; sources.py opens them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice
from typing import Any, Literal, Protocol

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..messages import counted
from ..ops.number_checks import height_width
from .rgb import as_rgb, correct_transparency, parse_background


logger = logging.getLogger(__name__)

MAX_NAMES = 8
"""Names of classes that a description gives."""


def check_stride(size: tuple[int, int], stride: tuple[int, int]) -> None:
    """Raises ValueError unless height and width are multiples of the tokenizer's (row, column) stride."""
    if size[0] % stride[0] or size[1] % stride[1]:
        raise ValueError(
            f"images of {size[0]} x {size[1]} pixels (height x width) do not divide into the tokenizer's cells of"
            f" {stride[0]} x {stride[1]} pixels; choose multiples of these."
        )


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as `(3, H, W)` float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """`(batch, 3, H, W)` floats, clamped to [-1, 1], as RGB images: the inverse of [`to_pixels`]."""
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def resize_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes with its proportions to the smallest image that covers `size` (height, width); bicubic, antialiased.

    Raises:
        ValueError: an image so long and thin that this would have more pixels than Pillow takes for harmless.
    """
    scale = max(size[0] / image.height, size[1] / image.width)
    width, height = max(size[1], round(image.width * scale)), max(size[0], round(image.height * scale))
    if Image.MAX_IMAGE_PIXELS and width * height > max(Image.MAX_IMAGE_PIXELS, image.width * image.height):
        raise ValueError(f"{image.width} x {image.height} pixels (width x height) are too long and thin to resize")
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def covering_size(resolution: tuple[int, int], crop_range: float) -> tuple[int, int]:
    """(height, width) of the image that crops of `resolution` are cut from; ValueError for a range below 1."""
    if crop_range < 1:
        raise ValueError(f"`crop_range` must be at least 1, got {crop_range}.")
    return int(resolution[0] * crop_range), int(resolution[1] * crop_range)


class ImageTransform:
    """Image of any size and mode -> `(3, H, W)` float32 in [-1, 1].

    The image becomes RGB ([`as_rgb`]), is resized until it just covers `crop_range` times `resolution`, cropped and
    perhaps mirrored. Random choices come from torch's global generator.

    Args:
        resolution: height and width of the result, pixels; one number for a square.
        crop: which part remains.
        random_flip: mirror left and right in half of the cases; wrong for images of text.
        crop_range: at least 1; above it the edges are cropped too. The range of arXiv 2410.01912 is 1.1.
        background: of transparent images: `white`, `black` or `#RRGGBB`.
    """

    def __init__(
        self,
        resolution: int | tuple[int, int],
        crop: Literal["center", "random"] = "center",
        random_flip: bool = False,
        crop_range: float = 1.0,
        background: str = "white",
    ):
        if crop not in ("center", "random"):
            raise ValueError(f"`crop` must be 'center' or 'random', got {crop!r}.")
        self.resolution = height_width("resolution", resolution)
        self.covering_size = covering_size(self.resolution, crop_range)
        self.crop, self.random_flip = crop, random_flip
        self.background = parse_background(background)

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.resolution
        image = resize_to_cover(as_rgb(image, self.background), self.covering_size)
        room = (image.height - height, image.width - width)
        if self.crop == "center":
            top, left = (space // 2 for space in room)
        else:
            top, left = (int(torch.randint(space + 1, ())) for space in room)
        image = image.crop((left, top, left + width, top + height))
        if self.random_flip and torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        return to_pixels(image)


def open_image(value: dict) -> Image.Image:
    """Decodes `{"bytes": of a file or None, "path": of a file}`."""
    source = value["path"] if value.get("bytes") is None else BytesIO(value["bytes"])
    with Image.open(source) as image:
        correct_transparency(image)
        image.load()
        image.getexif()  # which may need the file
        return image


class WithMirrorImage:
    """Image -> `(2, 3, H, W)` float32 in [-1, 1]: what `transform` makes of it, and the mirror image of that."""

    def __init__(self, transform: ImageTransform):
        self.transform, self.resolution = transform, transform.resolution

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = self.transform(image)
        return torch.stack([pixels, pixels.flip(-1)])


class TenCrop:
    """Image -> `(10, 3, H, W)` float32 in [-1, 1]: four corners, the center, and the mirror images of these five.

    The augmentation under which arXiv 2410.01912 extracts codes: the crops are cut from the center of the image,
    `crop_range` times as high and wide as `resolution`.
    """

    def __init__(self, resolution: int | tuple[int, int], crop_range: float = 1.1, background: str = "white"):
        self.resolution = height_width("resolution", resolution)
        self.center = ImageTransform(covering_size(self.resolution, crop_range), background=background)

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.resolution
        pixels = self.center(image)
        bottom, right = pixels.shape[1] - height, pixels.shape[2] - width
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
        crops = torch.stack([pixels[:, top : top + height, left : left + width] for top, left in corners])
        return torch.cat([crops, crops.flip(-1)])


class BrokenImageError(Exception):
    """An image that cannot be decoded: its `index` in the source, its `name` if it is a file, and the `reason`.

    The message gives the name where there is one, since the index depends on how many images are drawn.
    """

    def __init__(self, index: int, name: str | None, reason: str):
        super().__init__(f"image {name or index} is broken: {reason}")
        self.index, self.name, self.reason = index, name, reason


@dataclass
class ImageSource:
    """Images with labels, and what makes tensors of them.

    Args:
        source: its items are dicts of an image (PIL's, or not yet decoded as in `datasets.Image(decode=False)`) and,
            where `label_column` is given, a label: an integer, or a string of `class_names`.
        transform: [`ImageTransform`], [`TenCrop`] or another function of one image.
        class_names: name of each label; without labels there is one class.
        image_column, label_column: keys of the source's items; `label_column=None`: every label is 0.
        caption_column: key of a text that describes the image; `None`: there are no captions.
        labels: the labels as they stand in the source, one for each class, in the order of `class_names`; `None`: they
            are the numbers of the classes, or the names.
        skipped: files that are no images, for [`description`], as `.svg 2, .txt 1`.
        files_digest: SHA-256 of the names of the files, in order, where the source is a folder of images.
    """

    source: Any
    transform: Any
    class_names: list[str]
    image_column: str = "image"
    label_column: str | None = "label"
    labels: list[int] | None = None
    skipped: str = ""
    files_digest: str | None = None
    caption_column: str | None = None

    def __post_init__(self):
        self._class_of_name = {name: number for number, name in enumerate(self.class_names)}
        self._class_of_number = {label: number for number, label in enumerate(self.labels or ())}

    @property
    def description(self) -> str:
        """One line, for the start of a run: `801 images, 2 classes: ant, bee; files skipped: .svg 2, .txt 1`."""
        names = ", ".join(self.class_names[:MAX_NAMES]) + (", …" if len(self.class_names) > MAX_NAMES else "")
        number = counted(len(self.source), "image") if isinstance(self, ImageDataset) else "images as they arrive"
        classes = f"{counted(len(self.class_names), 'class')}: {names}" if len(self.class_names) > 1 else "one class"
        return f"{number}, {classes}" + (f"; files skipped: {self.skipped}" if self.skipped else "")

    def prepare(self, index: int, item: dict) -> dict:
        """`{"pixel_values": transform(image), "label": int}`, and "caption" where there are, of item `index`.

        Raises:
            BrokenImageError: the image cannot be decoded.
            ValueError: it has no label, or none of the classes, or no caption.
        """
        label = item[self.label_column] if self.label_column else 0
        number = self._class_of_name.get(label) if isinstance(label, str) else label
        if self.labels is not None and self.label_column:
            number = self._class_of_number.get(label)
        if number is None or not 0 <= number < len(self.class_names):
            raise ValueError(
                f"image {index} has the label {label!r} in {self.label_column!r}, which is none of the"
                f" {len(self.class_names)} classes; choose another split or column."
            )
        caption = {"caption": item[self.caption_column]} if self.caption_column else {}
        if caption and not isinstance(caption["caption"], str):
            raise ValueError(f"image {index} has no caption in {self.caption_column!r}: leave it out, or write one.")
        value = item[self.image_column]
        if isinstance(value, dict) and value.get("bytes") is None and "://" in (value.get("path") or ""):
            with fsspec.open(value["path"]) as file:  # a failing connection does not make an image broken
                value = {**value, "bytes": file.read()}
        try:
            if value is None:
                raise ValueError("there is no image")
            image = value if isinstance(value, Image.Image) else open_image(value)
            pixels = self.transform(ImageOps.exif_transpose(image))  # photographs are turned as the camera was held
        except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
            name = value.get("path") if isinstance(value, dict) else None
            raise BrokenImageError(index, name, f"{type(error).__name__}: {error}") from error
        return {"pixel_values": pixels, "label": int(number), **caption}


class ImageDataset(ImageSource, torch.utils.data.Dataset):
    """Map-style dataset of [`ImageSource`]'s items over an indexable source."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        return self.prepare(index, self.source[index])

    def num_parts(self, part_size: int) -> int:
        """Into how many parts of `part_size` images (the last may be smaller) [`read`] divides the source."""
        return -(-len(self) // part_size)

    def read(self, part: int, part_size: int, first: int = 0) -> Iterator[tuple[int, dict]]:
        """(index, item for `prepare`) of each image of a part, from the part's image `first`."""
        end = min((part + 1) * part_size, len(self))
        return ((index, self.source[index]) for index in range(part * part_size + first, end))


class ImageStream(ImageSource):
    """Images that arrive in a fixed order, file by file, and are not kept: an `IterableDataset` of `datasets`."""

    def num_parts(self, part_size: int) -> int:
        """Number of the source's files (its `num_shards`), whatever `part_size`: what can be read independently."""
        return self.source.num_shards

    def read(self, part: int, part_size: int, first: int = 0) -> Iterator[tuple[int, dict]]:
        """(index, item for `prepare`) of each image of a part; indices are `part * 2^32 +` the place in the part."""
        # `iter`, because a plain loop would divide the images among the workers of a DataLoader a second time.
        batches = self.source.shard(self.source.num_shards, part).iter(batch_size=16)
        items = (dict(zip(batch, values)) for batch in batches for values in zip(*batch.values()))
        return islice(enumerate(items, part << 32), first, None)


class SizedDataset(Protocol):
    """A map-style dataset with a length, which PyTorch's `Dataset` does not promise."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict: ...


class ReplaceBrokenImages(torch.utils.data.Dataset):
    """An [`ImageDataset`], or part of one, with the next image in the place of each that is broken.

    An item remains a function of its index. Each broken image is logged once, and counted over the worker processes
    of one DataLoader.

    Args:
        dataset: map-style; its items raise [`BrokenImageError`].
        max_broken_share: in [0, 1].
        num_images: of the whole data set, which the share refers to; default: the length of `dataset`.

    Raises:
        RuntimeError: while reading, once more than this share has turned out to be broken.
    """

    def __init__(self, dataset: SizedDataset, max_broken_share: float, num_images: int | None = None):
        self.dataset, self.max_broken_share, self.num_images = dataset, max_broken_share, num_images or len(dataset)
        self.broken = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        for place in chain(range(index, len(self)), range(index)):
            if self.broken[place]:
                continue
            try:
                return self.dataset[place]
            except BrokenImageError as error:
                self.broken[place] = True
                logger.warning("%s; another takes its place.", error)
                check_broken_share(int(self.broken.sum()), self.num_images, self.max_broken_share, str(error))
        raise RuntimeError("every image is broken.")


def check_broken_share(num_broken: int, num_images: int, max_broken_share: float, example: str) -> None:
    """Raises RuntimeError, with one broken image as an example, where too large a share of the images is broken."""
    if num_broken > max_broken_share * num_images:
        raise RuntimeError(
            f"{num_broken} of {counted(num_images, 'image')} cannot be decoded, more than `max_broken_share`"
            f" {max_broken_share} allows; for example, {example}. Remove the broken files, or allow a larger share and"
            " resume."
        )


def collate_images(items: list[dict]) -> dict[str, Any]:
    """Items of an [`ImageDataset`] to `pixel_values` `(batch, 3, H, W)`, `labels` `(batch,)` int64 and, where there
    are captions, the list `captions`."""
    batch: dict[str, Any] = {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["label"] for item in items]),
    }
    return batch | ({"captions": [item["caption"] for item in items]} if "caption" in items[0] else {})
