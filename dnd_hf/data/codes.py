"""Datasets of codes: what a tokenizer makes of images, stored once and read from disk while training.

A codes folder is a `datasets` data set in the layout of `save_to_disk`, with the columns `codes` (height x width x
depth, uint16), `label` (a ClassLabel that knows the names), `image_index` (the image a row was made from) and, where
the images have captions, `caption`; the tokenizer itself lies beside it in the folder `vqvae`, so that codes and
decoder cannot be confused.

It is written shard by shard ([`CodesWriter`]). A shard gets its name when it is complete and is never touched again, so
an extraction can be killed and resumed; `dataset_info.json` comes last and says that the folder is complete.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from torch import Tensor

from ..files import keep_settings, read_json, remove, write_json, write_text, written_whole
from .images import BrokenImageError, ImageDataset, ImageStream, collate_images


MAX_VOCAB_SIZE = 2**16
"""Codes are stored in 16 bits."""

Rows = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, list[str]]
"""Codes `(batch, height, width, depth)`, labels `(batch,)`, image indices `(batch,)`, and perhaps captions."""


def codes_features(shape: tuple[int, int, int], class_names: list[str], with_captions: bool = False) -> Features:
    """Columns of a codes dataset whose codes are (height, width, depth)."""
    codes = Value("uint16")
    for length in reversed(shape):
        codes = List(codes, length=length)
    columns = {"codes": codes, "label": ClassLabel(names=class_names), "image_index": Value("int64")}
    return Features(columns | ({"caption": Value("string")} if with_captions else {}))


@dataclass
class ShardReader(torch.utils.data.IterableDataset):
    """Batches of the images of an extraction, in the order of its shards; worker processes share the parts.

    A part of the source (see `read` of [`ImageDataset`] and [`ImageStream`]) becomes shards 0, 1, ... of `shard_size`
    images each, the last one smaller. Batches do not cross shards, so a shard's codes do not depend on where an
    extraction was interrupted.

    Args:
        dataset: the images.
        parts: (part, its first shard that is missing), what to read.
        shard_size, batch_size: images of a shard and of a batch.

    Items are dicts of the `part` and either

    - `broken`, the attributes of each [`BrokenImageError`], and, unless all are broken, `pixel_values`
      `(batch, [crops,] 3, H, W)`, `labels` and `image_index` `(batch,)`, and perhaps the list `captions`; or
    - `shard`, whose batches are complete, and `last`, whether it is the last one of the part.
    """

    dataset: ImageDataset | ImageStream
    parts: list[tuple[int, int]]
    shard_size: int
    batch_size: int

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        for part, shard in self.parts[worker.id :: worker.num_workers] if worker else self.parts:
            images = self.dataset.read(part, self.shard_size, shard * self.shard_size)
            following = next(images, None)
            while following is not None:
                rest = chain([following], islice(images, self.shard_size - 1))
                while batch := list(islice(rest, self.batch_size)):
                    yield {"part": part, **self._collate(batch)}
                following = next(images, None)
                yield {"part": part, "shard": shard, "last": following is None}
                shard += 1

    def _collate(self, images: list[tuple[int, dict]]) -> dict:
        items, image_index, broken = [], [], []
        for index, item in images:
            try:
                items.append(self.dataset.prepare(index, item))
                image_index.append(index)
            except BrokenImageError as error:
                broken.append(vars(error))
        batch = collate_images(items) | {"image_index": torch.tensor(image_index)} if items else {}
        return {"broken": broken, **batch}


class CodesWriter:
    """Writes a codes folder, by any number of processes, as often interrupted as it may be.

    Args:
        path: the folder.
        features: see [`codes_features`].
        settings: all that the codes depend on, as JSON; an interrupted extraction resumes with the same ones only.

    Raises:
        ValueError: the folder holds an extraction with other settings, or another data set.
    """

    def __init__(self, path: str | Path, features: Features, settings: dict):
        self.path, self.features = Path(path), features
        file = self.path / "extraction.json"
        if self.is_complete and not file.exists():
            raise ValueError(f"{path} holds a data set already.")
        keep_settings(file, settings, "codes of another extraction")

    @property
    def is_complete(self) -> bool:
        """Whether [`finish`] has been here."""
        return (self.path / "dataset_info.json").exists()

    def write(self, part: int, shard: int, last: bool, batches: list[Rows], broken: list[dict]) -> dict:
        """Writes one shard: shards of a part in their order, parts in any. Returns what [`shards`] says of it.

        Args:
            part, shard: its place; a folder's rows are in the order of (part, shard).
            last: whether the part ends here.
            batches: the rows, with captions where the folder has them; codes lie in [0, 65535].
            broken: of each image that has no rows, its "index", "name" and "reason".

        Raises:
            ValueError: a code outside [0, 65535].
        """
        schema = self.features.arrow_schema
        table, num_images = schema.empty_table(), len(broken)
        if batches:
            tensors, captions = zip(*((batch[:3], batch[3:]) for batch in batches))
            codes, labels, image_index = (torch.cat(column) for column in zip(*tensors))
            low, high = codes.aminmax()
            if low < 0 or high >= MAX_VOCAB_SIZE:
                raise ValueError(f"codes must lie in [0, {MAX_VOCAB_SIZE}), got {low} to {high}.")
            column = pa.array(codes.numpy().astype(np.uint16).reshape(-1))
            for length in reversed(codes.shape[1:]):
                column = pa.FixedSizeListArray.from_arrays(column, length)
            columns = [column, pa.array(labels.numpy()), pa.array(image_index.numpy())]
            columns += [pa.array(chain(*lists), pa.string()) for lists in zip(*captions)]
            table, num_images = pa.Table.from_arrays(columns, schema=schema), num_images + len(image_index.unique())
        note = {"last": last, "num_images": num_images, "broken": broken}
        table = table.replace_schema_metadata({**schema.metadata, "dnd_hf": json.dumps(note)})
        with (
            written_whole(self.path / f"data-{part:05d}-{shard:05d}.arrow") as unfinished,
            pa.OSFile(str(unfinished), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)
        return note

    def shards(self) -> dict[tuple[int, int], dict]:
        """(part, shard) -> its "last", "num_images" and "broken", for each shard there is, in order."""
        shards = {}
        for path in self.path.glob("data-*.arrow"):
            _, part, shard = path.stem.split("-")
            with pa.ipc.open_stream(str(path)) as reader:
                shards[int(part), int(shard)] = json.loads(reader.schema.metadata[b"dnd_hf"])
        return dict(sorted(shards.items()))

    def finish(self) -> None:
        """Makes one dataset of all shards as they lie, and lists broken images in `broken_images.jsonl`."""
        shards = self.shards()
        broken = [json.dumps(image) + "\n" for note in shards.values() for image in note["broken"]]
        write_text(self.path / "broken_images.jsonl", "".join(broken))
        for leftover in self.path.glob(".*.unfinished"):  # of processes that were killed
            remove(leftover)
        # The library describes a dataset without rows, whose description fits the shards too.
        with TemporaryDirectory(dir=self.path, prefix=".", suffix=".unfinished") as folder:
            with _no_progress_bar():
                empty = datasets.Dataset.from_dict({name: [] for name in self.features}, features=self.features)
                empty.save_to_disk(folder)
            state = read_json(Path(folder, "state.json")) | {
                "_data_files": [{"filename": f"data-{part:05d}-{shard:05d}.arrow"} for part, shard in shards],
                "_fingerprint": generate_random_fingerprint(),
            }
            write_json(self.path / "state.json", state)
            Path(folder, "dataset_info.json").replace(self.path / "dataset_info.json")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keeps `datasets` from showing how it writes nothing."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


class CodesDataset(torch.utils.data.Dataset):
    """Map-style dataset of `{"codes": (height, width, depth) int64, "label": int}`, and "caption" where the folder has
    captions, memory-mapped from it.

    Args:
        path: the folder; its tokenizer is `path/vqvae`.

    Raises:
        ValueError: the folder holds no codes dataset, or an unfinished one.
    """

    def __init__(self, path: str | Path):
        if not Path(path, "dataset_info.json").exists():
            if Path(path, "extraction.json").exists():
                raise ValueError(f"{path} is unfinished: start examples/extract_codes.py again as before.")
            if not Path(path).exists():
                raise ValueError(f"There is no folder {path}; examples/extract_codes.py makes codes datasets.")
            raise ValueError(f"{path} holds no codes dataset; examples/extract_codes.py makes one.")
        rows = datasets.load_from_disk(str(path))
        if "codes" not in rows.column_names:
            raise ValueError(f"{path} is a data set without a column of codes.")
        self.class_names = rows.features["label"].names
        feature, shape = rows.features["codes"], []
        while isinstance(feature, List):
            shape.append(feature.length)
            feature = feature.feature
        self.shape = tuple(shape)
        # Each image has equally many rows, one behind the other; numbers are missing where images were broken.
        images = rows.select_columns("image_index")
        first = images[0]["image_index"]
        self.crops_per_image = sum(1 for _ in takewhile(lambda row: row["image_index"] == first, images))
        # Rows stay Arrow tables: turning nested lists into arrays would cost thirty times the reading.
        self.has_captions = "caption" in rows.column_names
        self.rows = rows.with_format("arrow", columns=["codes", "label", *["caption"] * self.has_captions])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        values = row["codes"].chunk(0)
        for _ in self.shape:
            values = values.flatten()
        codes = torch.from_numpy(values.to_numpy().astype(np.int64).reshape(self.shape))
        return {"codes": codes, **{name: row[name][0].as_py() for name in row.column_names if name != "codes"}}


def collate_codes(items: list[dict]) -> dict[str, Any]:
    """Items of a [`CodesDataset`] to `codes` `(batch, height, width, depth)` and `labels` `(batch,)`, int64, and, where
    there are captions, the list `captions`."""
    batch: dict[str, Any] = {
        "codes": torch.stack([item["codes"] for item in items]),
        "labels": torch.tensor([item["label"] for item in items]),
    }
    return batch | ({"captions": [item["caption"] for item in items]} if "caption" in items[0] else {})
