"""Datasets of codes: what a tokenizer makes of pictures, stored once and read from disk while training.

A codes folder is a `datasets` data set, written by `save_to_disk`, with the columns `codes` (height x width x depth,
uint16), `label` (a ClassLabel that knows the names) and `image_index` (the picture a row was made from); the tokenizer
itself lies beside it in the folder `vqvae`, so that codes and decoder cannot be confused.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor


MAX_VOCAB_SIZE = 2**16
"""Codes are stored in 16 bits."""


def codes_features(shape: tuple[int, int, int], class_names: list[str]) -> Features:
    """Columns of a codes dataset whose codes are (height, width, depth)."""
    codes = Value("uint16")
    for length in reversed(shape):
        codes = List(codes, length=length)
    return Features({"codes": codes, "label": ClassLabel(names=class_names), "image_index": Value("int64")})


def write_codes(path: str | Path, features: Features, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Writes one Arrow file of a codes dataset.

    Args:
        path: the file.
        features: see [`codes_features`].
        batches: codes `(batch, height, width, depth)` in [0, 65535], labels `(batch,)`, image indices `(batch,)`.

    Raises:
        ValueError: a code outside [0, 65535].
    """
    with ArrowWriter(path=str(path), features=features) as writer:
        for codes, labels, image_index in batches:
            low, high = codes.aminmax()
            if low < 0 or high >= MAX_VOCAB_SIZE:
                raise ValueError(f"codes must lie in [0, {MAX_VOCAB_SIZE}), got {low} to {high}.")
            column = pa.array(codes.cpu().numpy().astype(np.uint16).reshape(-1))
            for length in reversed(codes.shape[1:]):
                column = pa.FixedSizeListArray.from_arrays(column, length)
            columns = [column, pa.array(labels.cpu().numpy()), pa.array(image_index.cpu().numpy())]
            writer.write_table(pa.Table.from_arrays(columns, schema=features.arrow_schema))
        writer.finalize()


def join_codes(folder: str | Path, output_dir: str | Path) -> None:
    """Makes one codes dataset in `output_dir` of the Arrow files in `folder`, by name, and deletes that folder."""
    shards = [datasets.Dataset.from_file(str(path)) for path in sorted(Path(folder).glob("*.arrow"))]
    datasets.concatenate_datasets(shards).save_to_disk(output_dir)
    shutil.rmtree(folder)


class CodesDataset(torch.utils.data.Dataset):
    """Map-style dataset of `{"codes": (height, width, depth) int64, "label": int}`, memory-mapped from a codes folder.

    Args:
        path: the folder; its tokenizer is `path/vqvae`.

    Raises:
        ValueError: the folder holds no codes dataset.
    """

    def __init__(self, path: str | Path):
        if not Path(path, "dataset_info.json").exists():
            raise ValueError(f"{path} holds no codes dataset; examples/extract_codes.py makes one.")
        rows = datasets.load_from_disk(str(path))
        if "codes" not in rows.column_names:
            raise ValueError(f"{path} is a data set without a column of codes.")
        self.class_names = rows.features["label"].names
        feature, self.shape = rows.features["codes"], ()
        while isinstance(feature, List):
            feature, self.shape = feature.feature, (*self.shape, feature.length)
        self.crops_per_image = len(rows) // (rows[-1]["image_index"] + 1)
        # Rows stay Arrow tables: turning nested lists into arrays would cost thirty times the reading.
        self.rows = rows.with_format("arrow", columns=["codes", "label"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        values = row["codes"].chunk(0)
        for _ in self.shape:
            values = values.flatten()
        codes = torch.from_numpy(values.to_numpy().astype(np.int64).reshape(self.shape))
        return {"codes": codes, "label": row["label"][0].as_py()}


def collate_codes(items: list[dict]) -> dict[str, Tensor]:
    """Items of a [`CodesDataset`] to `codes` `(batch, height, width, depth)` and `labels` `(batch,)`, int64."""
    return {
        "codes": torch.stack([item["codes"] for item in items]),
        "labels": torch.tensor([item["label"] for item in items]),
    }
