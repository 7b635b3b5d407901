"""Folders of images and their texts: made shard by shard in several processes, killed and resumed at will.

A finished folder is what `datasets.load_dataset` reads, with one split: `train/000000.parquet`, ... or, as an image
folder, `train/000000/00000.png`, ... and `train/metadata.jsonl`; `report.json` counts what was left out.

Until then all lies in `.unfinished`, which `load_dataset` does not see, so that no part is taken for the whole. A shard
is a function of its number only; its note, written last, says that it is there.
"""

import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from ..files import keep_settings, remove, write_json, write_text, written_whole
from ..messages import counted


logger = logging.getLogger(__name__)

ROW_GROUP = 100
"""Images that are in memory at once while a parquet file is written, or later read."""


@dataclass
class Note:
    """What became of the items of a shard: images there are, what was `left_out` and how often, `broken` sources."""

    images: int = 0
    left_out: Counter = field(default_factory=Counter)
    broken: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.left_out = Counter(self.left_out)

    def add(self, other: "Note") -> None:
        self.images += other.images
        self.left_out += other.left_out
        self.broken += other.broken


class ImageMaker(Protocol):
    """Makes images of items. Processes get copies, so it can be pickled."""

    features: Features
    """Columns of the rows: "image", "text" and others."""

    def rows(self, items: list, note: Note) -> Iterator[dict]:
        """The rows of a shard's items, "image" a PIL image, a function of the items only; fills in `note`."""
        ...


def in_batches(items: Iterable, size: int, weight: Callable[[Any], int] = lambda item: 1) -> Iterator[list]:
    """Lists of consecutive items, each just long enough for its weights to add up to `size`; the last is the rest."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += weight(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class ImageShards:
    """Writes a folder of images, by any number of processes.

    Args:
        path: the folder.
        maker: what makes the images.
        settings: all that the images depend on, as JSON; an interrupted folder resumes with the same ones only.
        output_format: "parquet", or "imagefolder": one PNG file per image.

    Raises:
        ValueError: another format, or the folder holds images of other settings, or something else.
    """

    def __init__(
        self,
        path: str | Path,
        maker: ImageMaker,
        settings: dict,
        output_format: Literal["parquet", "imagefolder"] = "parquet",
    ):
        if output_format not in ("parquet", "imagefolder"):
            raise ValueError(f"`output_format` must be 'parquet' or 'imagefolder', got {output_format!r}.")
        self.path, self.maker, self.output_format = Path(path), maker, output_format
        self.unfinished = self.path / ".unfinished"
        self.settings = json.loads(json.dumps(settings))
        self.settings_file = self.path / ".settings.json"
        if self.settings_file.exists():
            keep_settings(self.settings_file, self.settings, "images of other settings")
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{path} is not an empty folder.")

    @property
    def is_complete(self) -> bool:
        """Whether [`make`] has reached its end."""
        return (self.path / "train").exists()

    def write(self, number: int, items: list) -> Note:
        """Makes and writes shard `number`, of these items; a shard without images is only a note."""
        note = Note()
        rows = self._encoded(self.maker.rows(items, note), note)
        is_parquet = self.output_format == "parquet"
        final = self.unfinished / "train" / (f"{number:06d}.parquet" if is_parquet else f"{number:06d}")
        with written_whole(final) as unfinished:
            if is_parquet:
                self._write_parquet(unfinished, rows)
            else:
                self._write_folder(unfinished, final.name, rows)
        if not note.images:
            remove(final)
        write_json(self._note(number), vars(note))
        return note

    def _note(self, number: int) -> Path:
        return self.unfinished / "notes" / f"{number:06d}.json"

    @staticmethod
    def _encoded(rows: Iterator[dict], note: Note) -> Iterator[dict]:
        """The rows, counted, with the bytes of PNG files in the place of images."""
        for row in rows:
            file = BytesIO()
            row["image"].save(file, "PNG")
            note.images += 1
            yield row | {"image": file.getvalue()}

    def _write_parquet(self, path: Path, rows: Iterator[dict]) -> None:
        schema = self.maker.features.arrow_schema
        with pq.ParquetWriter(path, schema) as writer:
            while group := list(islice(rows, ROW_GROUP)):
                group = [row | {"image": {"bytes": row["image"]}} for row in group]
                writer.write_table(pa.Table.from_pylist(group, schema=schema))

    def _write_folder(self, path: Path, name: str, rows: Iterator[dict]) -> None:
        path.mkdir()
        lines = []
        for number, row in enumerate(rows):
            (path / f"{number:05d}.png").write_bytes(row.pop("image"))
            lines.append(json.dumps({"file_name": f"{name}/{number:05d}.png", **row}) + "\n")
        write_text(self.unfinished / "metadata" / name, "".join(lines))

    def note(self, number: int) -> Note | None:
        """What shard `number` holds; None unless it is there whole."""
        file = self._note(number)
        return Note(**json.loads(file.read_text())) if file.exists() else None

    def make(self, batches: Iterable[list], num_processes: int) -> Note:
        """Makes the shards that are missing, shard i of the i-th batch, then finishes the folder, and prints the rate.

        Args:
            batches: the items of each shard, always the same.
            num_processes: at least 1.

        Raises:
            ValueError: `num_processes` below 1, or nothing to make an image of.
            BrokenProcessPool: a process was killed; the same call resumes.
        """
        if num_processes < 1:
            raise ValueError(f"`num_processes` must be positive, got {num_processes}.")
        for name in ("train", "notes", "metadata"):
            (self.unfinished / name).mkdir(parents=True, exist_ok=True)
        write_json(self.settings_file, self.settings)
        total, made, start, running = Note(), Note(), time.perf_counter(), set()
        progress = tqdm(unit=" images")
        # No pool of multiprocessing: that one waits forever for a process that the system has killed.
        pool = ProcessPoolExecutor(num_processes, initializer=_end_with_parent)
        try:
            for number, items in enumerate(batches):
                if note := self.note(number):
                    total.add(note)
                    continue
                running.add(pool.submit(self.write, number, items))
                while len(running) > 2 * num_processes:
                    running = self._collect(running, made, progress)
            while running:
                running = self._collect(running, made, progress)
        finally:
            pool.shutdown(cancel_futures=True)
            progress.close()
        rate = made.images / (time.perf_counter() - start)
        total.add(made)
        self._finish(total)
        print(f"{self.path}: {counted(total.images, 'image')}, {made.images:,} of them made now, {rate:.1f} images/s")
        left_out = json.dumps(total.left_out) if total.left_out else "nothing"
        print(f"by {counted(num_processes, 'process')}; left out: {left_out}")
        return total

    @staticmethod
    def _collect(running: set, made: Note, progress: tqdm) -> set:
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            note = future.result()
            made.add(note)
            progress.update(note.images)
            for source in note.broken:
                logger.warning("%s is left out: %s", source["name"], source["reason"])
        return running

    def _finish(self, total: Note) -> None:
        if not total.images:
            raise ValueError(f"there is nothing to make an image of; left out: {dict(total.left_out)}{total.broken}.")
        total.broken.sort(key=lambda source: source["name"])
        total.left_out = Counter(dict(sorted(total.left_out.items())))
        for leftover in self.unfinished.glob("*/.*.unfinished"):  # of processes that were killed
            remove(leftover)
        write_json(self.path / "report.json", vars(total))
        if self.output_format == "imagefolder":
            # One file, because `datasets` reads several in any order.
            lines = [file.read_text() for file in sorted((self.unfinished / "metadata").iterdir())]
            write_text(self.unfinished / "train" / "metadata.jsonl", "".join(lines))
        (self.unfinished / "train").replace(self.path / "train")
        shutil.rmtree(self.unfinished)


@dataclass
class ShardArguments:
    """The folder of images, and how it is made. The scripts which make such folders share these options."""

    output_dir: str | None = HfArg(default=None, help="Folder of the images.")
    output_format: Literal["parquet", "imagefolder"] = HfArg(
        default="parquet", help="Parquet files, or PNG files and a metadata.jsonl."
    )
    num_processes: int = HfArg(
        default_factory=lambda: os.cpu_count() or 1,
        help="Processes, without influence on the result; default: all cores.",
    )
    seed: int = HfArg(default=0, help="Of all random choices.")

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("`output_dir` is needed.")
        if self.num_processes < 1:
            raise ValueError(f"`num_processes` must be positive, got {self.num_processes}.")

    def open_shards(self, maker: ImageMaker, **digests) -> ImageShards:
        """The folder of these options, and of digests of files that the images depend on."""
        settings = asdict(self) | digests
        for name in ("output_dir", "num_processes"):
            del settings[name]
        return ImageShards(str(self.output_dir), maker, settings, self.output_format)


def _end_with_parent() -> None:
    """Lets a process of the pool end when the one that started it is killed; by itself it would wait forever."""

    def watch(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, args=(multiprocessing.parent_process(),), daemon=True).start()
