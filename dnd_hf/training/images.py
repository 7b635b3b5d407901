"""The images of a training run: what it trains on, and what it holds out for validation."""

from dataclasses import replace
from typing import Literal

from torch.utils.data import Dataset, Subset

from ..arguments import RunArguments
from ..data.images import ImageDataset, ImageTransform, ReplaceBrokenImages
from .data_order import hold_out


def load_training_images(
    args: RunArguments, size: tuple[int, int], caption_column: str | None = None
) -> tuple[ImageDataset, Dataset, Dataset]:
    """The images that `args` name, cropped to `size` (height, width), with the captions of a column.

    Returns:
        The whole data set; the part to train on, augmented as `args` ask for; and the part held out, cropped at the
        center. Broken images of the parts are replaced ([`ReplaceBrokenImages`]).

    Raises:
        ValueError: see [`load_image_dataset`] and [`hold_out`].
    """
    crop: Literal["random", "center"] = "random" if args.random_crop else "center"
    transform = ImageTransform(size, crop, args.random_flip, args.crop_range, args.background)
    dataset = args.load_images(transform, caption_column)
    if not isinstance(dataset, ImageDataset):
        raise ValueError("`streaming` data cannot be trained on, whose samples come in random order.")
    train_set, held_out = hold_out(dataset, args.num_validation_images, args.seed)
    center = ImageTransform(size, crop_range=args.crop_range, background=args.background)
    centered = replace(dataset, transform=center)

    def without_broken(part: Subset) -> ReplaceBrokenImages:
        return ReplaceBrokenImages(part, args.max_broken_share, len(dataset))

    return dataset, without_broken(train_set), without_broken(Subset(centered, held_out.indices))
