"""Folders of image files as a data set: the class of an image is the top-level subfolder that it lies in.

The files are listed here rather than by `datasets`, which guesses splits from any path with "train" or "test" in it,
and the kind of data from the commonest suffix.

Rules:

1. Images are files with one of `IMAGE_SUFFIXES`. Names that begin with a dot are ignored, other files skipped.
2. Where all images lie in top-level folders whose names are those of splits (`SPLIT_FOLDERS`), and one of these has
   subfolders or a metadata file, or is the only one, these folders are the splits. Otherwise all is the split "train".
3. Where each image of a split lies in, or below, a folder with a metadata file (metadata.jsonl, .csv or .parquet with a
   column `file_name`, as `datasets` reads them), these files say which images there are and what belongs to them.
4. Otherwise the class is the split's top-level subfolder, however deep the file lies; without subfolders there is none.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import datasets
from datasets import ClassLabel, Dataset, Features, Value

from ..messages import counted


IMAGE_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg"),
    *(".jpx", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Split of a folder's name."""


def list_files(folder: str | os.PathLike) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted, without names that begin with a dot."""
    files = []
    for root, subfolders, names in os.walk(os.fspath(folder), followlinks=True):
        here = Path(root).resolve()
        subfolders[:] = [  # a link to a folder that it lies in would never end
            name
            for name in subfolders
            if not name.startswith(".") and not here.is_relative_to(Path(root, name).resolve())
        ]
        parent = Path(root).relative_to(folder)
        files += [(parent / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(files)


def is_image(file: str) -> bool:
    """Whether a file is an image, by its suffix."""
    return PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES


def count_kinds(files: Iterable[str]) -> str:
    """`.svg 2, .txt 1`: how many files there are of each suffix, the commonest first."""
    kinds = Counter(PurePosixPath(file).suffix.lower() or "no suffix" for file in files)
    return ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


def read_image_folder(
    folder: str | os.PathLike, split: str = "train", with_classes: bool = True
) -> tuple[Dataset, list[str]]:
    """The images of one split of a folder, by the rules above.

    Args:
        folder: the folder.
        split: "train", "validation" or "test", or a part such as "train[:10%]".
        with_classes: `False`: leave the classes out, so that images may lie anywhere.

    Returns:
        The data set: paths of the files in "image" and, where there are classes, a ClassLabel in "label"; or the
        columns of the metadata files. And the files of the split that are left out.

    Raises:
        ValueError: no images, or no such split; images beside class folders; folders that may be splits or classes.
    """
    folder = Path(folder)
    splits = _find_splits(folder)
    tops = {_top(file) for _, files in splits.values() for file in files if is_image(file)} - {""}
    class_names = sorted(tops) if with_classes else []
    name = split.partition("[")[0]
    if name not in splits:
        raise ValueError(f"{folder} has no split {name!r}; it has {', '.join(map(repr, splits))}.")
    root, files = splits[name]
    metadata = _metadata_files(files)
    rows = _rows_of_metadata(root, metadata) if metadata else _rows_of_files(root, files, class_names)
    used = {os.path.normpath(path) for path in rows["image"][:]} if metadata else set()
    skipped = [
        file
        for file in files
        if file not in metadata and (not is_image(file) or (metadata and os.path.normpath(root / file) not in used))
    ]
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    except ValueError as error:
        raise ValueError(f"A split must be a name or a part such as `{name}[:10%]`, got {split!r}.") from error
    return rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to)), skipped


def _find_splits(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Split -> its folder, and the files below that; rule 2."""
    files = list_files(folder)
    tops = sorted({_top(file) for file in files if is_image(file)})
    if not tops:
        raise ValueError(f"{folder} has {counted(len(files), 'file')} ({count_kinds(files) or 'none'}), no images.")
    if not all(top.lower() in SPLIT_FOLDERS for top in tops):
        return {"train": (folder, files)}
    members = {top: [file.removeprefix(f"{top}/") for file in files if _top(file) == top] for top in tops}
    nested = [top for top in tops if _metadata_files(members[top]) or any(_top(file) for file in members[top])]
    if not nested and len(tops) > 1:
        raise ValueError(
            f"{folder} has the folders {', '.join(tops)}, which may be splits or classes. If they are splits, name one:"
            f" {folder / tops[0]}. If they are classes, rename one, for example {tops[0]} to {tops[0]}_images."
        )
    splits = {SPLIT_FOLDERS[top.lower()]: (folder / top, members[top]) for top in tops}
    if len(splits) < len(tops):
        raise ValueError(f"{folder} has more than one folder for a split: {', '.join(tops)}. Name one of them instead.")
    return splits


def _top(file: str) -> str:
    """The top-level folder that a file lies in; "" for none."""
    return file.split("/", 1)[0] if "/" in file else ""


def _metadata_files(files: list[str]) -> list[str]:
    """The metadata files, where they cover all images; rule 3."""
    metadata = [file for file in files if PurePosixPath(file).name in METADATA_FILES]
    folders = {PurePosixPath(file).parent for file in metadata}
    covered = all(folders.intersection(PurePosixPath(file).parents) for file in files if is_image(file))
    return metadata if covered else []


def _rows_of_files(root: Path, files: list[str], class_names: list[str]) -> Dataset:
    images = [file for file in files if is_image(file)]
    columns, features = {"image": [str(root / file) for file in images]}, {"image": Value("string")}
    if class_names:
        beside = [file for file in images if not _top(file)]
        if beside:
            raise ValueError(
                f"{root} has {counted(len(beside), 'image')} beside its class folders, such as {beside[0]}, without a"
                " class. Move them into a folder, or leave `label_column` empty for one class."
            )
        features["label"] = ClassLabel(names=class_names)
        columns["label"] = [features["label"].str2int(_top(file)) for file in images]
    return Dataset.from_dict(columns, features=Features(features))


def _rows_of_metadata(root: Path, metadata: list[str]) -> Dataset:
    """The rows of metadata files as `datasets` reads them, with the paths of the files in "image"."""
    parts = [
        datasets.load_dataset("imagefolder", data_files={"train": [str(root / file)]}, split="train")
        for file in metadata
    ]
    rows = datasets.concatenate_datasets(parts)
    if "image" not in rows.features:
        raise ValueError(f"{root / metadata[0]} must have a column `file_name`; it has {list(rows.features)}.")
    paths = rows.cast_column("image", datasets.Image(decode=False))["image"]
    return rows.remove_columns("image").add_column("image", [path["path"] for path in paths])
