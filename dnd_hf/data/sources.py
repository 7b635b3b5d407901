"""Opens sources of labelled images: the rendered `words`, the Hub, local folders and files."""

import hashlib
import logging
import os
from pathlib import Path

import datasets

from ..messages import counted
from .folders import METADATA_FILES, count_kinds, is_image, list_files, read_image_folder
from .images import ImageDataset, ImageStream, ImageTransform, TenCrop, WithMirrorImage
from .rows import open_rows
from .words import WordImages


logger = logging.getLogger(__name__)

ROW_FILES = (".parquet", ".arrow", ".csv", ".json", ".jsonl", ".tar", ".zip")
"""What `datasets` makes rows of, where a folder holds no image files."""

MANY_CLASSES = 1000
"""More different numbers than this, and than half of the images, are no classes but numbers of something else."""


def load_image_dataset(
    name: str,
    transform: ImageTransform | WithMirrorImage | TenCrop,
    split: str = "train",
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    num_images: int | None = None,
    seed: int = 0,
    streaming: bool = False,
    caption_column: str | None = None,
) -> ImageDataset | ImageStream:
    """Opens a source of labelled images.

    Args:
        name: `words` (rendered while training, [`WordImages`] at the transform's resolution), a data set on the Hub, a
            folder of images ([`read_image_folder`]: the class is the top-level subfolder) or of parquet files, one
            parquet file (or a pattern such as `data/*.parquet`), or a folder written by `save_to_disk`.
        transform: what makes tensors of its images.
        split, config_name: as in `datasets.load_dataset`.
        image_column, label_column: its columns. Labels are integers or strings; where they are no ClassLabel, each
            distinct value is a class, in ascending order. `None`, or a source without the column "label": one class.
        num_images: how many `words` to render (default 100,000); of another source, how many to draw.
        seed: of the words, or of the draw.
        streaming: read the source as it arrives instead of downloading it whole. Its labels must be a ClassLabel:
            nothing else says beforehand which classes there are.
        caption_column: its column of texts that describe the images ("text" of the `words`); `None`: without captions.

    Raises:
        FileNotFoundError: no such source, here or on the Hub.
        ValueError: damaged files; no such split, no images in it or fewer than `num_images`; no such column, or none of
            images, of labels or of texts; an image without a label (-1 or None); numbers that are no classes; a stream
            where there can be none.
    """
    if streaming and num_images is not None:
        raise ValueError(f"`num_images` cannot be drawn from a stream, got {num_images}.")
    if name == "words" and not streaming:
        words = WordImages(num_images or 100_000, seed, *transform.resolution)
        if caption_column not in (None, "text"):
            raise ValueError(f'`caption_column` of the words must be "text", got {caption_column!r}.')
        return ImageDataset(words, transform, list(words.class_names), caption_column=caption_column)
    source, skipped, files_digest = _open(name, split, config_name, label_column is not None, streaming)
    if not streaming and not len(source):
        raise ValueError(f"{name} has no images in {split!r}.")
    _check_image_column(name, source, image_column)
    _check_caption_column(name, source, caption_column)
    features = source.features
    if label_column is None or (label_column == "label" and "label" not in features):
        label_column, class_names, labels = None, ["image"], None
    elif label_column not in features:
        raise ValueError(f"{name} has no column {label_column!r} of labels; it has {list(features)}.")
    else:
        class_names, labels = _classes(name, source, label_column, streaming)
    columns = (image_column, label_column, caption_column)
    source = source.select_columns(list(dict.fromkeys(column for column in columns if column)))
    source = source.cast_column(image_column, datasets.Image(decode=False))
    image_dataset = ImageStream if streaming else ImageDataset
    if num_images is not None:
        if num_images > len(source):
            raise ValueError(
                f"{name} has {counted(len(source), 'image')} in {split!r}, fewer than the {num_images:,} asked for."
            )
        source = source.shuffle(seed=seed).select(range(num_images))
    described = (class_names, image_column, label_column, labels, count_kinds(skipped), files_digest, caption_column)
    return image_dataset(source, transform, *described)


def _open(
    name: str, split: str, config_name: str | None, with_classes: bool, streaming: bool
) -> tuple[datasets.Dataset | datasets.IterableDataset, list[str], str | None]:
    """The rows of a source and, of a folder of images, the files that are no part of it and a digest of the others."""
    saved = next((path for path in (Path(name), Path(name, split)) if (path / "dataset_info.json").exists()), None)
    is_folder = not saved and config_name is None and Path(name).is_dir() and _holds_images(name)
    if streaming and (name == "words" or saved or is_folder):
        raise ValueError(f"{name} is on this machine: it needs no `streaming`.")
    if saved:
        return datasets.load_from_disk(str(saved)), [], None
    if is_folder:
        rows, skipped = read_image_folder(name, split, with_classes)
        names = "\0".join(os.path.relpath(path, name) for path in rows["image"][:])
        return rows, skipped, hashlib.sha256(os.fsencode(names)).hexdigest()
    is_parquet = name.endswith(".parquet")
    if Path(name).is_file() and not is_parquet:
        raise ValueError(f"{name} is a file; it must be a folder, a parquet file or a data set on the Hub.")
    source = {"path": "parquet", "data_files": name} if is_parquet else {"path": name, "name": config_name}
    return open_rows(name, **source, split=split, streaming=streaming), [], None


def _holds_images(folder: str) -> bool:
    """Whether a folder holds image files, not files of rows; ValueError where it holds both."""
    files = list_files(folder)
    rows = [file for file in files if Path(file).suffix.lower() in ROW_FILES and Path(file).name not in METADATA_FILES]
    images = sum(map(is_image, files))
    parquet = [file for file in rows if file.lower().endswith(".parquet")]
    if images and parquet:
        raise ValueError(
            f"{folder} holds {images} image files and {len(parquet)} parquet files. Name the parquet files by a"
            f" pattern ({folder}/{Path(parquet[0]).parent / '*.parquet'}), or the folder that the images lie in."
        )
    return images > 0 or not rows


def _check_image_column(name: str, source: datasets.Dataset | datasets.IterableDataset, column: str) -> None:
    if source.features is None:
        raise ValueError(f"{name} does not say which columns it has before it is read: it cannot be streamed.")
    if column not in source.features:
        raise ValueError(f"{name} has no column {column!r}; it has {list(source.features)}.")
    feature = source.features[column]
    is_file = isinstance(feature, dict) and {"bytes", "path"} & set(feature)
    is_text = str(getattr(feature, "dtype", "")).endswith(("string", "binary"))  # paths, or bytes of files
    if not (is_file or is_text or isinstance(feature, datasets.Image)):
        raise ValueError(f"column {column!r} of {name} holds no images but {feature}.")


def _check_caption_column(name: str, source: datasets.Dataset | datasets.IterableDataset, column: str | None) -> None:
    if column is None:
        return
    if column not in source.features:
        raise ValueError(f"{name} has no column {column!r} of captions; it has {list(source.features)}.")
    if not str(getattr(source.features[column], "dtype", "")).endswith("string"):
        raise ValueError(
            f"column {column!r} of {name} holds no captions, one text for each image, but {source.features[column]}."
        )


def _classes(
    name: str, source: datasets.Dataset | datasets.IterableDataset, column: str, streaming: bool
) -> tuple[list[str], list[int] | None]:
    """Names of the classes and, where numbers without names stand for them, these numbers in the same order."""
    feature = source.features[column]
    dtype = str(getattr(feature, "dtype", feature))
    named, is_text = isinstance(feature, datasets.ClassLabel), dtype.endswith("string")
    if not named and not is_text and not dtype.startswith(("int", "uint")):
        raise ValueError(f"column {column!r} of {name} holds {dtype}; labels are integers or strings.")
    if streaming:
        if not named:
            raise ValueError(f"column {column!r} of {name} does not name its classes (a ClassLabel): do not stream it.")
        return feature.names, None
    labels = source.unique(column)
    if any(label is None or (not is_text and label < 0) for label in labels):
        raise ValueError(
            f"{name} has images without a label, -1 or None in {column!r}: choose another split or column."
        )
    if named:
        return feature.names, None
    labels.sort()
    if is_text:
        return labels, None
    if len(labels) > max(MANY_CLASSES, len(source) / 2):
        raise ValueError(
            f"column {column!r} of {name} holds {len(labels)} different numbers for {len(source)} images: these are no"
            " classes. Choose another `label_column`, or leave it empty for one class."
        )
    if labels[-1] >= len(labels):
        logger.warning("%r of %s has gaps: its %d different numbers are the classes.", column, name, len(labels))
    return [str(label) for label in labels], labels
