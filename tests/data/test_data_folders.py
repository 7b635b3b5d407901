"""dnd_hf.data.folders: the class is the top-level subfolder, whatever files and folders are called."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from dnd_hf.data.folders import count_kinds, is_image, list_files, read_image_folder


def make(folder: Path, *files: str) -> Path:
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_image(file):
            Image.new("RGB", (2, 2)).save(path)
        else:
            path.write_text("")
    return folder


def labelled(folder: Path, split: str = "train", **options) -> dict[str, str]:
    """File, relative to the folder -> name of its class."""
    rows, _ = read_image_folder(folder, split, **options)
    names = rows.features["label"].names
    return {os.path.relpath(row["image"], folder): names[row["label"]] for row in rows}


@pytest.mark.parametrize(
    "files",
    [
        {"bus/a.png": "bus", "bus/b/c/d.png": "bus", "tram/e.png": "tram"},
        {"train/a.png": "train", "bus/b.png": "bus", "test/c/d.png": "test"},
        {"bus/train.png": "bus", "bus/b.png": "bus", "bus/test/c.png": "bus", "tram/train/d.png": "tram"},
        {"bus/validation-1.png": "bus", "data/train-00000-of-00001.png": "data"},
        {"only/a.png": "only", "only/b.jpg": "only"},
        {"a b/ö.PNG": "a b", "c/d.jpeg": "c"},
    ],
)
def test_the_class_is_the_top_level_folder_however_deep_and_whatever_the_names(tmp_path, files):
    assert labelled(make(tmp_path, *files)) == files


def test_other_files_are_left_out_and_counted_even_where_they_are_more(tmp_path):
    sounds = [f"bus/{number}.wav" for number in range(5)]
    make(tmp_path, "bus/a.png", "tram/b.png", *sounds, "list.csv", "tram/LICENCE", "bus/.DS_Store", ".git/c.png")
    rows, skipped = read_image_folder(tmp_path)
    assert len(rows) == 2 and sorted(skipped) == sorted([*sounds, "list.csv", "tram/LICENCE"])
    assert count_kinds(skipped) == ".wav 5, .csv 1, no suffix 1"


def test_images_come_in_the_order_of_their_paths(tmp_path):
    files = ["b/1.png", "a/2.png", "a/10.png", "b/0/0.png"]
    assert list(labelled(make(tmp_path, *files))) == sorted(files)


def test_a_folder_without_subfolders_has_no_classes(tmp_path):
    rows, _ = read_image_folder(make(tmp_path, "train.png", "test-1.png", "c.png"))
    assert rows.column_names == ["image"] and len(rows) == 3


def test_images_beside_class_folders_are_refused_unless_there_is_one_class(tmp_path):
    make(tmp_path, "a.png", "bus/b.png", "tram/c.png")
    with pytest.raises(ValueError, match=r"1 image beside its class folders, such as a\.png, without a class"):
        read_image_folder(tmp_path)
    rows, _ = read_image_folder(tmp_path, with_classes=False)
    assert rows.column_names == ["image"] and len(rows) == 3


def test_split_folders_with_classes_in_them_are_splits_with_the_same_classes(tmp_path):
    make(tmp_path, "train/bus/a.png", "train/tram/b.png", "val/tram/c/d.png", "test/e.png", "README.md")
    assert labelled(tmp_path) == {"train/bus/a.png": "bus", "train/tram/b.png": "tram"}
    assert labelled(tmp_path, "validation") == {"val/tram/c/d.png": "tram"}
    assert labelled(tmp_path, "train[:50%]") == {"train/bus/a.png": "bus"}
    with pytest.raises(ValueError, match="has no split 'dev'; it has 'test', 'train', 'validation'"):
        read_image_folder(tmp_path, "dev")
    with pytest.raises(ValueError, match=r"a part such as `train\[:10%\]`, got 'train\[half\]'"):
        read_image_folder(tmp_path, "train[half]")


def test_folders_that_may_be_splits_or_classes_are_refused_with_how_to_choose(tmp_path):
    make(tmp_path, "train/a.png", "test/b.png")
    with pytest.raises(ValueError, match=r"test, train, which may be splits or classes\. If they are splits, name one"):
        read_image_folder(tmp_path)
    assert read_image_folder(tmp_path / "train")[0].column_names == ["image"]
    (tmp_path / "test").rename(tmp_path / "test_images")
    assert labelled(tmp_path) == {"train/a.png": "train", "test_images/b.png": "test_images"}


def test_two_folders_of_one_split_are_refused(tmp_path):
    make(tmp_path, "val/a/a.png", "validation/b/b.png")
    with pytest.raises(ValueError, match="more than one folder for a split: val, validation"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("split", ["", "train/"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_metadata_say_which_images_there_are(tmp_path, split, suffix):
    make(tmp_path, f"{split}00/a.png", f"{split}00/b.png", f"{split}c.png")
    lines = [("00/b.png", "two"), ("c.png", "three")]
    text = {
        "jsonl": "".join(json.dumps({"file_name": file, "text": text}) + "\n" for file, text in lines),
        "csv": "file_name,text\n" + "".join(f"{file},{text}\n" for file, text in lines),
    }[suffix]
    (tmp_path / split / f"metadata.{suffix}").write_text(text)
    rows, skipped = read_image_folder(tmp_path)
    assert [(os.path.relpath(row["image"], tmp_path / split), row["text"]) for row in rows] == lines
    assert skipped == ["00/a.png"]


def test_metadata_of_one_class_folder_lose_no_images_of_the_others(tmp_path):
    make(tmp_path, "bus/a.png", "tram/b.png")
    (tmp_path / "bus" / "metadata.csv").write_text("file_name,text\na.png,hello\n")
    assert labelled(tmp_path) == {"bus/a.png": "bus", "tram/b.png": "tram"}
    assert read_image_folder(tmp_path)[1] == ["bus/metadata.csv"]


def test_linked_folders_are_followed_but_never_in_a_circle(tmp_path):
    make(tmp_path / "elsewhere", "a.png")
    folder = make(tmp_path / "folder", "tram/b.png")
    (folder / "bus").symlink_to(tmp_path / "elsewhere")
    (folder / "tram" / "again").symlink_to(folder)
    assert list_files(folder) == ["bus/a.png", "tram/b.png"]
    assert labelled(folder) == {"bus/a.png": "bus", "tram/b.png": "tram"}


def test_a_folder_without_images_is_refused_with_what_it_has(tmp_path):
    with pytest.raises(ValueError, match=r"has 2 files \(\.svg 2\), no images"):
        read_image_folder(make(tmp_path, "a.svg", "b/c.svg"))
