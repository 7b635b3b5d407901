"""Images to measure, batch by batch: of a data set, or samples in a folder or an .npz; broken ones are listed."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.images import BrokenImageError, collate_images, to_pixels
from ..data.rgb import as_rgb, correct_transparency
from ..messages import counted


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class Failure:
    """An image that a measurement leaves out: its index in the data set, what failed (`stage`), and why."""

    index: int
    stage: str
    reason: str

    def to_dict(self) -> dict:
        return asdict(self)


class ImageItems(Protocol):
    """Images by their indices; an item is `{"pixel_values": (3, H, W) float32 in [-1, 1], "label": int}`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


class SampleImages(Dataset):
    """Images that some model has made: a folder of them, subfolders too, in order of their paths, or an `.npz`.

    Items are `{"pixel_values": (3, H, W) float32 in [-1, 1], "label": 0}`, as those of an `ImageDataset`.

    Args:
        path: the folder, or an `.npz` whose `arr_0` is uint8 (n, H, W, 3), the format of the ADM evaluation suite.
        num_images: how many, from the first; all where None.

    Raises:
        ValueError: there are none, or fewer than `num_images`; the `.npz` holds something else.
        BrokenImageError: (while reading) an image cannot be decoded, or has not the size of the first one.
    """

    def __init__(self, path: str | Path, num_images: int | None = None):
        path = Path(path)
        self.images: Any  # files, or one array
        if path.suffix == ".npz":
            arrays = np.load(path)
            self.images = arrays["arr_0"] if "arr_0" in arrays else np.zeros(0)
            if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3:
                raise ValueError(f"{path} must hold `arr_0`, uint8 of shape (n, H, W, 3); it holds {arrays.files}.")
        elif path.is_dir():
            self.images = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        else:
            raise ValueError(f"{path} is neither a folder of images nor an .npz file.")
        if len(self.images) < (num_images or 1):
            raise ValueError(
                f"{path} has {counted(len(self.images), 'image')}; there must be at least {num_images or 1}."
            )
        self.images = self.images[:num_images]
        self.size = self._first_size()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        source = self.images[index]
        if isinstance(source, np.ndarray):
            return {"pixel_values": to_pixels(Image.fromarray(source)), "label": 0}
        try:
            with Image.open(source) as file:
                correct_transparency(file)
                image = as_rgb(file)
        except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
            raise BrokenImageError(index, str(source), f"{type(error).__name__}: {error}") from error
        if image.size != self.size:
            raise BrokenImageError(index, str(source), f"it is of {image.size} pixels, others of {self.size}")
        return {"pixel_values": to_pixels(image), "label": 0}

    def _first_size(self) -> tuple[int, int] | None:
        for source in self.images:
            if isinstance(source, np.ndarray):
                return source.shape[1::-1]
            with contextlib.suppress(Exception), Image.open(source) as file:
                return file.size
        return None


class _OrReason(Dataset):
    """(index, item) of `dataset`, with the reason in the place of an item that is broken."""

    def __init__(self, dataset: ImageItems):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, dict | str]:
        try:
            return index, self.dataset[index]
        except BrokenImageError as error:
            return index, str(error)


def read_batches(
    dataset: ImageItems, batch_size: int, failures: list[Failure], num_workers: int = 0, description: str | None = None
) -> Iterator[tuple[list[int], Tensor, list[int]]]:
    """Indices, images `(n, 3, H, W)` in [-1, 1] and labels of each batch; broken images go to `failures`.

    With a `description` there is a progress bar.

    Raises:
        ValueError: (after the last one) every image is broken.
    """
    read = 0
    loader = DataLoader(_OrReason(dataset), batch_size, num_workers=num_workers, collate_fn=list)
    with tqdm(total=len(dataset), desc=description, unit=" images", disable=description is None) as progress:
        for items in loader:
            failures += [Failure(index, "open", item) for index, item in items if isinstance(item, str)]
            items = [(index, item) for index, item in items if not isinstance(item, str)]
            if items:
                batch = collate_images([item for _, item in items])
                yield [index for index, _ in items], batch["pixel_values"], batch["labels"].tolist()
            read += len(items)
            progress.update(len(items))
    if not read:
        raise ValueError(f"none of {len(dataset):,} images can be read; for example, {failures[-1].reason}")


def to_levels(pixels: Tensor) -> Tensor:
    """`(n, 3, H, W)` floats, clamped to [-1, 1], as uint8: what a file of these images holds."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
