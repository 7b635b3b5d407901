"""examples/extract_codes.py: every picture exactly once, however the extraction was stopped, and never two mixed."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from dnd_hf import RQVAE
from dnd_hf.command_line import parse_arguments
from dnd_hf.data.codes import CodesDataset
from dnd_hf.data.images import TenCrop


REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "extract_codes.py"
NUM_IMAGES, BROKEN = 44, (5, 20, 43)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two tokenizers, and pictures of two classes: numbers below 22 are "even", the others "odd", three are broken."""
    folder = tmp_path_factory.mktemp("extract")
    for seed, name in enumerate(["rqvae", "other"]):
        torch.manual_seed(seed)
        RQVAE(
            sample_size=16, block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=8,
            vq_embed_dim=8, num_vq_embeddings=32, code_depth=2,
        ).save_pretrained(folder / name)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for number in range(NUM_IMAGES):
        path = folder / "pictures" / ("even" if number < 22 else "odd") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (20, 28, 3), dtype=torch.uint8, generator=generator).numpy()).save(path)
        if number in BROKEN:
            path.write_bytes(path.read_bytes()[:100])
    return folder


def options(folder: Path, output_dir: str, **changes) -> list[str]:
    values = dict(
        dataset_name=folder / "pictures", vqvae=folder / "rqvae", output_dir=folder / output_dir, ten_crop=True,
        batch_size=30, shard_size=4, dataloader_num_workers=0, max_broken_share=0.1,
    )  # fmt: skip
    return [word for name, value in {**values, **changes}.items() for word in (f"--{name}", str(value))]


def extract(folder: Path, output_dir: str, **changes) -> Path:
    """Extracts in this process; returns the folder of codes."""
    script = runpy.run_path(str(SCRIPT))
    script["main"](parse_arguments(script["ExtractionArguments"], options(folder, output_dir, **changes)))
    return folder / output_dir


def rows(codes: Path) -> dict:
    return datasets.load_from_disk(str(codes)).to_dict()


def versions(paths) -> dict:
    """Inode and time of change of each file: what writing it again would alter."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture(scope="module")
def codes(folder) -> Path:
    """An extraction that nothing interrupts."""
    return extract(folder, "codes")


def test_each_picture_has_its_ten_rows_and_each_broken_one_none(folder, codes):
    found, vae = rows(codes), RQVAE.from_pretrained(folder / "rqvae")
    whole = [number for number in range(NUM_IMAGES) if number not in BROKEN]
    assert found["image_index"] == [number for number in whole for _ in range(10)]
    assert found["label"] == [int(number >= 22) for number in whole for _ in range(10)]
    for place in (0, 5, 40):
        number = whole[place]
        path = folder / "pictures" / ("even" if number < 22 else "odd") / f"{number:02d}.png"
        expected = vae.encode(TenCrop(16)(Image.open(path))).codes
        assert torch.equal(torch.tensor(found["codes"][10 * place : 10 * place + 10]), expected)
    listed = [json.loads(line) for line in (codes / "broken_images.jsonl").read_text().splitlines()]
    assert [(entry["index"], Path(entry["name"]).name) for entry in listed] == [(i, f"{i:02d}.png") for i in BROKEN]
    dataset = CodesDataset(codes)
    assert dataset.crops_per_image == 10 and dataset.class_names == ["even", "odd"]


# The script as it is, but each process stays for ever in the middle of its third shard while the file `block` exists.
STOPPING_SCRIPT = """
import pathlib, runpy, time
import pyarrow as pa
new_stream, calls = pa.ipc.new_stream, []
def new_stream_or_stay(file, schema):
    calls.append(file)
    if len(calls) == 3 and pathlib.Path("block").exists():
        file.write(b"half a shard")
        file.flush()
        time.sleep(600)
    return new_stream(file, schema)
pa.ipc.new_stream = new_stream_or_stay
runpy.run_path({script!r}, run_name="__main__")
"""


def test_two_processes_that_were_killed_leave_the_same_rows_as_one_that_was_not(folder, codes):
    script, killed = folder / "stopping.py", folder / "killed"
    script.write_text(STOPPING_SCRIPT.format(script=str(SCRIPT)))
    (folder / "block").touch()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(script), *options(folder, "killed", dataloader_num_workers=1)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(3000):
            written, unfinished = (list(killed.glob(kind)) for kind in ("data-*.arrow", ".data-*.unfinished"))
            if (len(written), len(unfinished)) == (4, 2):
                break
            assert run.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        else:
            pytest.fail(f"the processes never came to where they are killed: {written}, {unfinished}")
    finally:
        # Each process has a session of its own, out of reach of one signal to the launcher's group.
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(run.pid)
            processes = [launcher, *launcher.children(recursive=True)]
            for process in processes:
                process.kill()
            psutil.wait_procs(processes)
    before = versions(written)
    assert len(before) == 4 and sorted(written) == sorted(killed.glob("data-*.arrow"))
    with pytest.raises(ValueError, match="is unfinished"):
        CodesDataset(killed)

    (folder / "block").unlink()
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert rows(killed) == rows(codes)
    assert (killed / "broken_images.jsonl").read_text() == (codes / "broken_images.jsonl").read_text()
    assert versions(written) == before and len(list(killed.glob("data-*"))) == 11
    assert not list(killed.glob("*.unfinished"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ten_crop": False}, "ten_crop was True and is False"),
        ({"crop_range": 1.2}, r"crop_range was 1\.1 and is 1\.2"),
        ({"background": "black"}, "background was 'white' and is 'black'"),
        ({"sample_size": 8}, r"sample_size was \[16, 16\] and is \[8, 8\]"),
        ({"num_train_images": 8}, "num_train_images was None and is 8; num_images was 44 and is 8"),
        ({"vqvae": "other"}, r"codes of another extraction: vqvae was '\w+\.\.\.\w+' and is"),
        ({"label_column": ""}, r"class_names was \['even', 'odd'\] and is \['image'\]"),
        ({"shard_size": 5}, "shard_size was 4 and is 5"),
    ],
)
def test_a_start_with_other_arguments_is_refused(folder, codes, monkeypatch, changes, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        extract(folder, "codes", **changes)


def test_the_configuration_of_the_tokenizer_counts_and_an_older_record_without_it_says_so(folder, codes, capsys):
    shutil.copytree(folder / "rqvae", folder / "edited")
    config = json.loads((folder / "edited" / "config.json").read_text())
    (folder / "edited" / "config.json").write_text(json.dumps(config | {"commitment_weight": 0.5}))
    with pytest.raises(ValueError, match=r"another extraction: vqvae_config was \{.*\} and is \{"):
        extract(folder, "codes", vqvae=folder / "edited")

    record = codes / "extraction.json"
    text = record.read_text()
    record.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "vqvae_config"}))
    try:
        extract(folder, "codes", vqvae=folder / "edited")
    finally:
        record.write_text(text)
    assert "does not record the tokenizer's configuration" in capsys.readouterr().out


def test_a_start_with_other_files_is_refused(folder, codes, monkeypatch):
    monkeypatch.chdir(folder)
    file = folder / "pictures" / "even" / "10.png"
    file.rename(file.with_name("10b.png"))
    try:
        with pytest.raises(ValueError, match=r"codes of another extraction: files_digest was '\w+\.\.\.\w+' and is"):
            extract(folder, "codes")
    finally:
        file.with_name("10b.png").rename(file)


def test_a_start_after_the_end_changes_nothing(folder, codes, capsys):
    before = versions(codes.rglob("*"))
    extract(folder, "codes", batch_size=7)
    assert "is complete already" in capsys.readouterr().out
    assert versions(codes.rglob("*")) == before


def test_too_many_broken_pictures_stop_the_extraction_and_a_larger_share_lets_it_go_on(folder, codes):
    with pytest.raises(RuntimeError, match=r"2 of 44 images cannot be decoded.*for example, image \S*/20.png is"):
        extract(folder, "strict", max_broken_share=0.04)
    assert not (folder / "strict" / "dataset_info.json").exists()
    assert rows(extract(folder, "strict")) == rows(codes)


@pytest.fixture(scope="module")
def parquet(folder) -> str:
    """The pictures in three files, as a pattern."""
    source = datasets.load_dataset(str(folder / "pictures"), split="train")
    source = source.cast_column("image", datasets.Image(decode=False))
    for file, numbers in enumerate([range(14), range(14, 26), range(26, 44)]):
        source.select(numbers).to_parquet(folder / f"pictures-{file}.parquet")
    return str(folder / "pictures-*.parquet")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_the_rows_of_the_same_data_whatever_was_there_before(folder, codes, parquet, num_workers):
    stream = dict(dataset_name=parquet, streaming=True, dataloader_num_workers=num_workers)
    name = f"stream-{num_workers}"
    expected, streamed = rows(codes), rows(extract(folder, name, **stream))
    assert (streamed["codes"], streamed["label"]) == (expected["codes"], expected["label"])
    places = [(index >> 32, index % 2**32) for index in streamed["image_index"][::10]]
    every = [(file, i) for file, length in enumerate([14, 12, 18]) for i in range(length)]
    assert places == [place for number, place in enumerate(every) if number not in BROKEN]

    # As a killed extraction leaves it: nothing of the first file, a part of the second, all of the third.
    for path in [*(folder / name).glob("data-00000-*"), *(folder / name).glob("data-00001-0000[12]*")]:
        path.unlink()
    (folder / name / "dataset_info.json").unlink()
    with pytest.raises(RuntimeError, match="3 of 44 images cannot be decoded"):
        extract(folder, name, **stream, max_broken_share=0.06)
    assert rows(extract(folder, name, **stream)) == streamed


def test_two_rows_a_picture_are_the_picture_and_its_mirror_image(folder):
    changes = dict(ten_crop=False, with_mirror_image=True, num_train_images=6, max_broken_share=1.0)
    codes = rows(extract(folder, "mirrored", **changes))
    alone = rows(extract(folder, "alone", **changes | {"with_mirror_image": False}))
    assert codes["codes"][::2] == alone["codes"] and codes["image_index"][::2] == codes["image_index"][1::2]
    assert codes["codes"][1::2] != alone["codes"]


@pytest.mark.parametrize(
    ("script", "arguments", "model"),
    [
        (
            "train_rqvae.py",
            "RQVAEArguments",
            "--sample_size 16 --block_out_channels 8 8 --layers_per_block 1 --norm_num_groups 4 --latent_channels 8"
            " --num_vq_embeddings 16 --min_perplexity 0",
        ),
        (
            "train.py",
            "DnDArguments",
            "--vqvae rqvae --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --num_samples 1",
        ),
    ],
)
def test_training_reports_broken_pictures_stops_at_too_many_and_resumes_on_the_same_files(
    folder, monkeypatch, caplog, script, arguments, model
):
    monkeypatch.chdir(folder)
    names = runpy.run_path(str(REPOSITORY / "examples" / script))
    # 36 pictures to train on and 8 held out: one step and its validation meet all of them.
    words = f"{model} --dataset_name pictures --train_batch_size 36 --max_train_steps 1 --num_validation_images 8"
    words += " --lr_warmup_steps 0 --dataloader_num_workers 0 --output_dir"

    def train(max_broken_share: float, *more: str) -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        options = [*words.split(), f"{script}-{max_broken_share}", "--max_broken_share", str(max_broken_share), *more]
        names["main"](parse_arguments(names[arguments], options))

    train(0.1)
    reported = [record.getMessage() for record in caplog.records if "is broken" in record.getMessage()]
    assert sorted(int(Path(message.split()[1]).stem) for message in reported) == list(BROKEN)
    with pytest.raises(RuntimeError, match="1 of 44 images cannot be decoded"):
        train(0.0)

    file = folder / "pictures" / "even" / "10.png"
    file.rename(file.with_name("10b.png"))
    try:
        with pytest.raises(ValueError, match=r"other settings: digest_of_file_names was '\w+\.\.\.\w+' and is"):
            train(0.1, "--resume_from_checkpoint", "latest")
    finally:
        file.with_name("10b.png").rename(file)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("extract_codes.py", "--vqvae v --ten_crop --with_mirror_image", "leave --with_mirror_image out"),
        ("extract_codes.py", "--vqvae v --shard_size 0", "--shard_size must be positive, got 0"),
        ("extract_codes.py", "--vqvae v --max_broken_share 2", "--max_broken_share must lie in [0, 1], got 2.0"),
        ("extract_codes.py", "--vqvae v --crop_range 0.5", "--crop_range must be at least 1, got 0.5"),
        ("extract_codes.py", "--vqvae v --num_train_images 0", "--num_train_images must be positive, got 0"),
        ("extract_codes.py", "--vqvae v --dataloader_num_workers -1", "--dataloader_num_workers must not be negative"),
        ("extract_codes.py", "--vqvae v --streaming --num_train_images 5", "cannot be drawn from --streaming"),
        ("train.py", "--vqvae v --streaming", "run extract_codes.py with --streaming"),
        ("train_rqvae.py", "--streaming", "run extract_codes.py with --streaming"),
    ],
)
def test_bad_options_end_with_a_message_before_any_work(tmp_path, monkeypatch, capsys, script, words, message):
    monkeypatch.setattr(sys, "argv", [script, "--dataset_name", "words", "--output_dir", str(tmp_path), *words.split()])
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPOSITORY / "examples" / script), run_name="__main__")
    assert message in " ".join(capsys.readouterr().err.split()) and not list(tmp_path.iterdir())
