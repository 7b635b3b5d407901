"""dnd_hf.data.codes: codes come back from disk exactly as they were written, however often that was interrupted."""

import json

import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dnd_hf.data.codes import CodesDataset, CodesWriter, ShardReader, codes_features, collate_codes
from dnd_hf.data.images import ImageDataset, ImageTransform
from dnd_hf.training.data_order import hold_out


SHAPE = (3, 5, 2)
CODES = torch.randint(0, 2**16, (12, *SHAPE), generator=torch.Generator().manual_seed(0))
CODES[0, 0, 0] = torch.tensor([0, 65535])
LABELS = torch.arange(12) % 3


def make_writer(path, **settings) -> CodesWriter:
    return CodesWriter(path, codes_features(SHAPE, ["ant", "bee", "cat"]), settings)


def write(writer: CodesWriter, place: tuple[int, int], rows, image_index: list[int], broken: tuple = ()) -> None:
    """Writes the rows of `CODES` as a shard in batches of two."""
    batches = zip(*(column.split(2) for column in (CODES[rows], LABELS[rows], torch.tensor(image_index))))
    writer.write(*place, True, list(batches), [{"index": i, "name": None, "reason": "torn"} for i in broken])


def test_codes_come_back_exactly_in_the_order_of_the_shards_not_of_their_writing(tmp_path):
    writer = make_writer(tmp_path)
    for place, rows in {(1, 0): slice(8, 12), (0, 1): slice(5, 8), (0, 0): slice(0, 5)}.items():
        write(writer, place, rows, list(range(12)[rows]))
    writer.write(0, 2, True, [], [])
    writer.finish()
    dataset = CodesDataset(tmp_path)
    batch = collate_codes([dataset[i] for i in range(len(dataset))])
    assert torch.equal(batch["codes"], CODES) and batch["codes"].dtype == torch.int64
    assert torch.equal(batch["labels"], LABELS)
    assert dataset.shape == SHAPE and dataset.class_names == ["ant", "bee", "cat"] and dataset.crops_per_image == 1


def test_the_finished_dataset_reads_the_shards_where_they_lie(tmp_path):
    writer = make_writer(tmp_path)
    write(writer, (0, 0), slice(0, 12), list(range(12)))
    (shard,) = tmp_path.glob("*.arrow")
    before = (shard.stat().st_ino, shard.stat().st_mtime_ns)
    writer.finish()
    assert list(tmp_path.rglob("*.arrow")) == [shard] and (shard.stat().st_ino, shard.stat().st_mtime_ns) == before
    assert CodesDataset(tmp_path).rows.cache_files == [{"filename": str(shard)}]


def test_broken_images_leave_no_rows_and_their_crops_stay_together(tmp_path):
    writer = make_writer(tmp_path)
    write(writer, (0, 0), slice(0, 6), [1, 1, 1, 3, 3, 3], broken=(0, 2))
    writer.write(0, 1, True, [], [{"index": 4, "name": "4.png", "reason": "torn"}])
    write(writer, (0, 2), slice(6, 12), [5, 5, 5, 7, 7, 7], broken=(6,))
    assert [note["num_images"] for note in writer.shards().values()] == [4, 1, 3]
    writer.finish()
    lines = (tmp_path / "broken_images.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 2, 4, 6]
    dataset = CodesDataset(tmp_path)
    assert len(dataset) == 12 and dataset.crops_per_image == 3
    rest, held_out = hold_out(dataset, 2, seed=0, group_size=dataset.crops_per_image)
    first = min(held_out.indices)
    assert sorted(held_out.indices) == [first, first + 1, first + 2] and first % 3 == 0 and len(rest) == 9


def test_a_shard_that_could_not_be_written_whole_has_no_name(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    new_stream = pa.ipc.new_stream

    def disk_full(file, schema):
        new_stream(file, schema).close()
        raise OSError("no space left on device")

    monkeypatch.setattr(pa.ipc, "new_stream", disk_full)
    with pytest.raises(OSError, match="no space"):
        write(writer, (0, 0), slice(0, 12), list(range(12)))
    assert writer.shards() == {} and [path.name for path in tmp_path.iterdir()] == ["extraction.json"]
    monkeypatch.undo()
    killed = tmp_path / ".data-00000-00000.arrow.0123.unfinished"  # what is left where there was no time to clean up
    killed.write_bytes(b"half a shard")
    write(writer, (0, 0), slice(0, 12), list(range(12)))
    writer.finish()
    assert len(CodesDataset(tmp_path)) == 12 and not list(tmp_path.glob("*unfinished")) and not killed.exists()


def test_an_extraction_goes_on_with_the_same_settings_alone(tmp_path):
    make_writer(tmp_path, sample_size=(16, 32), crops=10)
    make_writer(tmp_path, sample_size=(16, 32), crops=10)
    with pytest.raises(ValueError, match="another extraction: crops was 10 and is 2; seed was None and is 0"):
        make_writer(tmp_path, sample_size=(16, 32), crops=2, seed=0)
    with pytest.raises(ValueError, match="is unfinished"):
        CodesDataset(tmp_path)


def test_other_data_sets_are_neither_read_nor_overwritten(tmp_path):
    with pytest.raises(ValueError, match="holds no codes dataset"):
        CodesDataset(tmp_path)
    (tmp_path / "dataset_info.json").touch()
    with pytest.raises(ValueError, match="holds a data set already"):
        make_writer(tmp_path)


def test_codes_that_do_not_fit_16_bits_are_refused(tmp_path):
    for wrong in (-1, 2**16):
        batch = (torch.full((1, *SHAPE), wrong), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        with pytest.raises(ValueError, match="must lie in"):
            make_writer(tmp_path).write(0, 0, True, [batch], [])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_reader_gives_each_missing_shard_its_images_once(num_workers):
    images = [{"image": Image.new("RGB", (8, 8), (i, i, i)), "label": 0} for i in range(14)]
    for broken in (4, 5, 10):
        images[broken]["image"] = None
    dataset = ImageDataset(images, ImageTransform(8), ["image"])
    # Shard 0 of part 1 is there already; of the four parts of four images, the last has two.
    reader = ShardReader(dataset, [(0, 0), (1, 1), (2, 0), (3, 0)], shard_size=4, batch_size=2)
    found, ends, broken = {}, [], []
    for batch in DataLoader(reader, batch_size=None, num_workers=num_workers):
        if "shard" in batch:
            ends.append((batch["part"], batch["shard"], batch["last"]))
            continue
        assert batch["part"] not in [part for part, *_ in ends]
        broken += [image["index"] for image in batch["broken"]]
        levels = (batch["pixel_values"].mean((1, 2, 3)) + 1) * 127.5
        assert levels.round().int().tolist() == batch["image_index"].tolist()
        found.setdefault(batch["part"], []).append(batch["image_index"].tolist())
    assert found == {0: [[0, 1], [2, 3]], 2: [[8, 9], [11]], 3: [[12, 13]]}
    assert sorted(ends) == [(0, 0, True), (2, 0, True), (3, 0, True)] and broken == [10]


def test_a_part_longer_than_a_shard_goes_on_where_it_ended():
    class Stream(ImageDataset):
        def read(self, part, part_size, first=0):
            return ((index, self.source[index]) for index in range(first, len(self.source)))

    dataset = Stream([{"image": Image.new("RGB", (8, 8)), "label": 0}] * 8, ImageTransform(8), ["image"])
    for first, expected in [(0, [(0, 4, False), (1, 4, True)]), (1, [(1, 4, True)]), (2, [])]:
        shards, read = [], 0
        for batch in ShardReader(dataset, [(0, first)], shard_size=4, batch_size=3):
            if "shard" in batch:
                shards.append((batch["shard"], read, batch["last"]))
                read = 0
            else:
                read += len(batch["labels"])
        assert shards == expected
