"""dnd_hf.data.sources: images and classes of every kind of source, with their names."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dnd_hf.data.images import ImageTransform, collate_images, to_pixels
from dnd_hf.data.sources import load_image_dataset


@pytest.fixture
def image() -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def test_words_are_rendered_at_the_resolution_with_their_names():
    dataset = load_image_dataset("words", ImageTransform((32, 96)), num_images=12)
    batch = collate_images([dataset[i] for i in range(4)])
    assert len(dataset) == 12 and len(dataset.class_names) == 100
    assert batch["pixel_values"].shape == (4, 3, 32, 96) and batch["labels"].tolist() == [0, 1, 2, 3]


def test_a_folder_of_class_folders_has_their_names(tmp_path, image):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            ImageOps.expand(image, i).save(tmp_path / name / f"{i}.png")
    dataset = load_image_dataset(str(tmp_path), ImageTransform((40, 60)))
    assert dataset.class_names == ["cat", "dog"] and len(dataset) == 4
    assert torch.equal(dataset[0]["pixel_values"], to_pixels(image))
    with pytest.raises(ValueError, match="fewer than the 5"):
        load_image_dataset(str(tmp_path), ImageTransform(8), num_images=5)


@pytest.mark.parametrize(
    ("labels", "names"), [(["b", "a", "b"], ["a", "b"]), ([2, 0, 2], ["0", "2"]), (None, ["image"])]
)
def test_labels_may_be_strings_or_integers_or_missing(tmp_path, image, labels, names):
    columns = {"image": [image] * 3} | ({"label": labels} if labels else {})
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    dataset = load_image_dataset(str(tmp_path / "saved"), ImageTransform(8))
    assert dataset.class_names == names
    assert [names[dataset[i]["label"]] for i in range(3)] == [str(label) for label in labels or ["image"] * 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "image"}, r"no column 'image'.*photo"),
        ({"image_column": "number"}, "'number' of .* holds no images"),
        ({"label_column": "lable"}, r"no column 'lable' of labels.*half"),
        ({"label_column": "share"}, "'share' of .* holds float64; labels are integers or strings"),
        ({"label_column": "number"}, "without a label, -1 or None in 'number'"),
        ({"label_column": "half"}, "without a label, -1 or None in 'half'"),
        ({"streaming": True}, "is on this machine"),
        ({"streaming": True, "num_images": 1}, "`num_images` cannot be drawn from a stream, got 1"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, image, options, message):
    columns = {"photo": [image] * 2, "number": [-1, 0], "half": [None, "cat"], "share": [0.5, 1.0]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        load_image_dataset(str(tmp_path / "saved"), ImageTransform(8), **{"image_column": "photo", **options})


def test_labels_can_be_left_aside_and_a_split_of_a_saved_dict_read(tmp_path, image):
    saved = datasets.Dataset.from_dict({"photo": [image] * 2, "label": [-1, 0]})
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path)
    options = {"image_column": "photo", "label_column": None}
    dataset = load_image_dataset(str(tmp_path), ImageTransform(8), split="test", **options)
    assert len(dataset) == 1 and dataset[0]["label"] == 0 and dataset.class_names == ["image"]


@pytest.fixture
def parquet(tmp_path) -> str:
    """Two files of five grey images and three classes, as a pattern."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])})
    for file in range(2):
        numbers = range(5 * file, 5 * file + 5)
        columns = {"image": [Image.new("L", (9, 8), 20 * i) for i in numbers], "label": [i % 3 for i in numbers]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{file}.parquet")
    return str(tmp_path / "*.parquet")


def test_a_stream_gives_each_file_the_images_that_indices_give(parquet):
    dataset = load_image_dataset(parquet, ImageTransform(8))
    stream = load_image_dataset(parquet, ImageTransform(8), streaming=True)
    assert stream.class_names == dataset.class_names == ["ant", "bee", "cat"] and stream.num_parts(1) == 2
    found = [(part, *image) for part in range(2) for image in stream.read(part, 1)]
    assert [(part, index - part * 2**32) for part, index, _ in found] == [(i // 5, i % 5) for i in range(10)]
    for (_, index, item), expected in zip(found, dataset, strict=True):
        read = stream.prepare(index, item)
        assert read["label"] == expected["label"] and torch.equal(read["pixel_values"], expected["pixel_values"])
    assert [index for index, _ in stream.read(1, 1, first=3)] == [2**32 + 3, 2**32 + 4]


def test_a_stream_of_classes_without_names_is_refused(tmp_path, image):
    datasets.Dataset.from_dict({"image": [image], "label": [0]}).to_parquet(tmp_path / "0.parquet")
    with pytest.raises(ValueError, match="does not name its classes"):
        load_image_dataset(str(tmp_path / "0.parquet"), ImageTransform(8), streaming=True)


def save(path, **columns) -> str:
    datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * len(columns["label"]), **columns}).save_to_disk(
        path
    )
    return str(path)


def test_a_number_of_ten_million_is_one_class_of_its_own_and_is_said_to_be(tmp_path, caplog):
    dataset = load_image_dataset(save(tmp_path / "saved", label=[10_000_000, 3, 10_000_000]), ImageTransform(8))
    assert dataset.class_names == ["3", "10000000"] and [item["label"] for item in dataset] == [1, 0, 1]
    assert "has gaps: its 2 different numbers are the classes" in caplog.text
    assert dataset.description == "3 images, 2 classes: 3, 10000000"


def test_numbers_that_are_no_classes_are_refused(tmp_path):
    labels = list(range(0, 4800, 2))
    source = datasets.Dataset.from_dict({"image": [b""] * len(labels), "label": labels})
    source.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"'label' of .* holds 2400 different numbers for 2400 images"):
        load_image_dataset(str(tmp_path / "saved"), ImageTransform(8))
    assert load_image_dataset(str(tmp_path / "saved"), ImageTransform(8), label_column=None).class_names == ["image"]


def test_a_description_names_the_first_classes(tmp_path):
    dataset = load_image_dataset(save(tmp_path / "saved", label=list("abcdefghij")), ImageTransform(8))
    assert dataset.description == "10 images, 10 classes: a, b, c, d, e, f, g, h, …"


def test_a_folder_says_what_it_holds_and_what_is_skipped(tmp_path, image):
    for file in ("ant/0.png", "bee/deep/1.jpg", "bee/2.svg", "3.svg", "ant/list.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith((".png", ".jpg")):
            image.save(tmp_path / file)
        else:
            (tmp_path / file).write_text("x")
    dataset = load_image_dataset(str(tmp_path), ImageTransform(8))
    assert dataset.description == "2 images, 2 classes: ant, bee; files skipped: .svg 2, .txt 1"
    assert [item["label"] for item in dataset] == [0, 1]
    with pytest.raises(ValueError, match="is on this machine"):
        load_image_dataset(str(tmp_path), ImageTransform(8), streaming=True)


def test_a_folder_of_parquet_files_is_read_as_such_and_not_beside_images(parquet, tmp_path, image):
    dataset = load_image_dataset(str(tmp_path), ImageTransform(8))
    assert len(dataset) == 10 and dataset.class_names == ["ant", "bee", "cat"]
    image.save(tmp_path / "logo.png")
    with pytest.raises(ValueError, match=r"holds 1 image files and 2 parquet files\. Name .*\*\.parquet"):
        load_image_dataset(str(tmp_path), ImageTransform(8))


def test_a_folder_of_sounds_is_said_to_have_no_images(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.wav").touch()
    with pytest.raises(ValueError, match=r"has 3 files \(\.wav 3\), no images"):
        load_image_dataset(str(tmp_path), ImageTransform(8))


def test_what_is_not_there_is_said_to_be_neither_here_nor_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot be opened: .*/phots does not exist, and "):
        load_image_dataset(str(tmp_path / "phots"), ImageTransform(8))


def test_files_of_another_kind_and_damaged_ones_are_refused(tmp_path, image, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    image.save(tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"one\.png is a file; it must be a folder, a parquet file"):
        load_image_dataset(str(tmp_path / "one.png"), ImageTransform(8))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"torn\.parquet cannot be read: Parquet"):
        load_image_dataset(str(tmp_path / "torn.parquet"), ImageTransform(8))


def test_a_folder_is_known_by_the_names_of_its_files_wherever_it_lies(tmp_path, image):
    def digest(folder: str) -> str:
        return load_image_dataset(str(tmp_path / folder), ImageTransform(8)).files_digest

    for folder, files in {"one": ("a/0.png", "b/1.png"), "two": ("a/0.png", "b/2.png")}.items():
        for file in files:
            (tmp_path / folder / file).parent.mkdir(parents=True)
            image.save(tmp_path / folder / file)
    first = digest("one")
    (tmp_path / "one").rename(tmp_path / "moved")
    assert digest("moved") == first != digest("two")
