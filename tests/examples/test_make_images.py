"""examples/make_*_images.py: the same folder however many processes made it, and however often they were killed."""

import json
import os
import runpy
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from dnd_hf.command_line import parse_arguments
from dnd_hf.data.images import ImageTransform
from dnd_hf.data.sources import load_image_dataset


REPOSITORY = Path(__file__).parents[2]
TEXT, PDF = "make_text_images.py", "make_pdf_images.py"
ARGUMENTS = {TEXT: "TextImageArguments", PDF: "PdfImageArguments"}

OPTIONS = {
    TEXT: "--dataset_name prose.jsonl --image_size 128 --font_size 14 --margin 8 --shard_characters 400",
    PDF: "--pdf_dir papers --page_size 400 300 --crop_size 96 --crops_per_page 4 --shard_pages 2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Texts, each a shard, and PDFs. The third shard of either has no images: no glyphs, or two blank pages."""
    folder = tmp_path_factory.mktemp("make")
    rng = np.random.default_rng(0)

    def prose(number: int) -> str:
        return " ".join("".join(rng.choice(list("aeinorst"), rng.integers(1, 9))) for _ in range(100 + number))

    texts = [prose(number) for number in range(12)]
    texts[2] = "漢字 " * 150
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "papers" / "old").mkdir(parents=True)
    for name, pages in (("a.pdf", "xx__xxx"), ("old/b.pdf", "xxxx")):
        with PdfPages(folder / "papers" / name) as pdf:
            for page in pages.replace("xx__", "xxxx__", 1):
                figure = Figure((3, 4))
                if page == "x":
                    for line in range(20):
                        figure.text(0.05, 0.95 - line / 20, prose(0)[:40], size=8)
                pdf.savefig(figure)
    (folder / "papers" / "broken.pdf").write_text("no PDF")
    return folder


@pytest.fixture(autouse=True)
def own_place(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make(script: str, output_dir: str, options: str = "") -> Path:
    """Runs a script in this process, as its own command line would."""
    words = f"{OPTIONS[script]} --num_processes 1 --output_dir {output_dir} {options}"
    names = runpy.run_path(str(REPOSITORY / "examples" / script))
    names["main"](parse_arguments(names[ARGUMENTS[script]], words.split()))
    return Path(output_dir)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def rows(path: Path) -> list[dict]:
    return list(datasets.load_dataset(str(path), split="train"))


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """A function that returns the folder that one process makes, in one go, made once."""
    made = {}

    def get(script: str, output_format: str) -> Path:
        name = f"{script}-{output_format}"
        if name not in made:
            made[name] = folder / make(script, name, f"--output_format {output_format}")
        return made[name]

    return get


@pytest.mark.parametrize("script", [TEXT, PDF])
def test_both_formats_are_read_back_with_the_same_images_and_texts(folder, uninterrupted, script):
    parquet, images = (rows(uninterrupted(script, output_format)) for output_format in ("parquet", "imagefolder"))
    assert len(parquet) == len(images) > 20
    for row, other in zip(parquet, images):
        assert np.array_equal(row.pop("image"), other.pop("image"))
        assert row == other
    assert all(row["text"].strip() for row in parquet)
    if script == TEXT:
        texts = [json.loads(line)["text"] for line in (folder / "prose.jsonl").read_text().splitlines()]
        for source, text in enumerate(texts):
            shown = " ".join(row["text"] for row in parquet if row["source"] == source)
            assert shown == ("" if source == 2 else text)


@pytest.mark.parametrize(
    ("script", "report"),
    [
        (TEXT, {"left_out": {"words that no font shows": 150}, "broken": []}),
        (PDF, {"left_out": {"crops that are nearly empty": 8}}),
    ],
)
def test_the_report_counts_images_and_what_was_left_out(uninterrupted, script, report):
    path = uninterrupted(script, "parquet")
    found = json.loads((path / "report.json").read_text())
    assert found["images"] == len(rows(path)) and found == found | report
    if script == PDF:
        assert [source["name"] for source in found["broken"]] == ["broken.pdf"]
        assert found["images"] + 8 == 4 * (9 + 4)


def test_the_training_data_reader_takes_the_folder(uninterrupted):
    dataset = load_image_dataset(str(uninterrupted(TEXT, "parquet")), ImageTransform(64))
    assert dataset[0]["pixel_values"].shape == (3, 64, 64) and dataset.class_names == ["image"]


# The script as it is, but the process that has the fourth shard stays for ever after its first image.
STOPPING_SCRIPT = """
import pathlib, runpy, time
from dnd_hf.data.pdf import PdfCrops
from dnd_hf.data.text import TextImages
def stay_in_the_fourth_shard(maker, first):
    rows = maker.rows
    def rows_or_stay(self, items, note):
        for row in rows(self, items, note):
            yield row
            if first(items[0]):
                pathlib.Path("reached").touch()
                time.sleep(600)
    maker.rows = rows_or_stay
stay_in_the_fourth_shard(TextImages, lambda item: item[0] == 3)
stay_in_the_fourth_shard(PdfCrops, lambda item: (item.name, item.page) == ("a.pdf", 6))
if __name__ == "__main__":
    runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(("script", "output_format"), [(TEXT, "parquet"), (PDF, "imagefolder")])
def test_two_processes_that_were_killed_leave_the_same_files_as_one_that_was_not(
    folder, uninterrupted, script, output_format
):
    expected, name = contents(uninterrupted(script, output_format)), f"killed-{Path(script).stem}"
    Path("stopping.py").write_text(STOPPING_SCRIPT.format(script=str(REPOSITORY / "examples" / script)))
    Path("reached").unlink(missing_ok=True)
    options = f"{OPTIONS[script]} --output_format {output_format} --output_dir {name} --num_processes 2"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "stopping.py", *options.split()]
    with open("log", "w") as log:
        run = psutil.Popen(command, env=environment, stdout=log, stderr=log)
    notes = folder / name / ".unfinished" / "notes"
    try:
        for _ in range(3000):
            written = sorted(notes.glob("*.json"))
            if Path("reached").exists() and len(written) >= 4:
                break
            assert run.poll() is None, Path("log").read_text()
            time.sleep(0.1)
        else:
            pytest.fail(f"the processes never came to where they are killed: {written}")
        processes = run.children()
    finally:
        run.kill()
        run.wait()
    assert len(processes) == 2
    _, alive = psutil.wait_procs(processes, timeout=30)
    for process in alive:
        process.kill()
    assert not alive and "000003.json" not in {path.name for path in written}
    with pytest.raises(FileNotFoundError):
        datasets.load_dataset(str(folder / name))

    written[0].unlink()  # as if the kill had come after the images of a shard and before its note
    train = notes.parent / "train"
    (notes.parent / "metadata" / ".000001.0123.unfinished").write_text('{"file_name": "000')
    whole = [path for path in train.iterdir() if not path.name.startswith(".")]
    kept = {path.name: path.stat().st_ino for path in whole if path.stem != written[0].stem}
    assert len(kept) >= 2 and list(train.glob(".000003*.unfinished"))
    make(script, name, f"--output_format {output_format}")
    assert contents(folder / name) == expected
    assert kept == {file: (folder / name / "train" / file).stat().st_ino for file in kept}


def test_two_processes_make_the_files_that_one_makes(uninterrupted):
    assert contents(make(TEXT, "two", "--num_processes 2")) == contents(uninterrupted(TEXT, "parquet"))


def test_a_start_after_the_end_changes_nothing_and_one_with_other_settings_is_refused(uninterrupted, capsys):
    path = uninterrupted(PDF, "parquet")
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    make(PDF, path.name, "--num_processes 2")
    assert "is complete already" in capsys.readouterr().out
    for options, message in [
        ("--seed 1", "seed was 0 and is 1"),
        ("--crop_size 90", r"crop_size was \[96\] and is \[90\]"),
        ("--output_format imagefolder", "output_format was 'parquet' and is 'imagefolder'"),
    ]:
        with pytest.raises(ValueError, match=f"holds images of other settings: {message}"):
            make(PDF, path.name, options)
    with pytest.raises(ValueError, match="papers is not an empty folder"):
        make(PDF, "papers")
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_where_everything_is_left_out_there_is_an_error(folder):
    with pytest.raises(ValueError, match=r"left out: {'crops that are nearly empty': 52"):
        make(PDF, "nothing", "--min_ink 1")
    assert not (folder / "nothing" / "train").exists()


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (TEXT, "", "--dataset_name is needed"),
        (TEXT, "--dataset_name x --num_texts 0", "--num_texts must be positive, got 0"),
        (TEXT, "--dataset_name x --shard_characters 0", "--shard_characters must be positive, got 0"),
        (TEXT, "--dataset_name x --num_processes 0", "--num_processes must be positive, got 0"),
        (TEXT, "--dataset_name x --fonts nowhere.ttf", "nowhere.ttf is no font that can be used"),
        (TEXT, "--dataset_name x --margin 300", "has no room for a line"),
        (PDF, "", "--pdf_dir is needed"),
        (PDF, "--pdf_dir nowhere", "nowhere holds no PDFs"),
        (PDF, "--pdf_dir papers --shard_pages 0", "--shard_pages must be positive, got 0"),
        (PDF, "--pdf_dir papers --min_ink 2", "--min_ink must lie in [0, 1], got 2.0"),
    ],
)
def test_bad_options_end_with_a_message_before_any_work(folder, capsys, script, options, message):
    names = runpy.run_path(str(REPOSITORY / "examples" / script))
    with pytest.raises(SystemExit):
        parse_arguments(names[ARGUMENTS[script]], ["--output_dir", "bad", *options.split()])
    assert message in " ".join(capsys.readouterr().err.split()) and not (folder / "bad").exists()
