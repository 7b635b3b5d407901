"""Samples for evaluation: which images they are, that they can resume, and the file of the ADM suite."""

import numpy as np
import pytest
import torch
from PIL import Image

from dnd_hf.evaluation import sampling
from dnd_hf.evaluation.sampling import sample_images, write_npz


def pixels(files) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in files])


def test_every_sample_is_that_of_its_label_and_seed_whatever_the_batch(make_pipeline, tmp_path):
    pipe = make_pipeline()
    files = sample_images(pipe, tmp_path / "a", 8, seed=5, batch_size=3, sampling={"guidance_scale": 3.0})
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(8)]
    for i, image in enumerate(pixels(files)):
        alone = pipe(i % 4, generator=torch.Generator().manual_seed(5 + i), guidance_scale=3.0).images[0]
        assert (image == np.asarray(alone)).all()
    others = sample_images(pipe, tmp_path / "b", 8, seed=5, batch_size=8, sampling={"guidance_scale": 3.0})
    assert (pixels(files) == pixels(others)).all()
    assert len({image.tobytes() for image in pixels(files)}) == 8


def test_a_stopped_run_makes_what_is_missing_and_later_more(make_pipeline, tmp_path):
    pipe = make_pipeline()
    files = sample_images(pipe, tmp_path, 8)
    before = pixels(files)
    files[3].unlink()
    for file in files[:3]:
        file.write_bytes(b"kept")
    more = sample_images(pipe, tmp_path, 12)
    assert [file.read_bytes() for file in files[:3]] == [b"kept"] * 3
    assert (pixels(more[3:8]) == before[3:]).all() and len(more) == 12 and more[11].exists()
    assert not list(tmp_path.glob("*.part"))


def test_processes_share_the_samples_and_make_each_once(make_pipeline, tmp_path, monkeypatch):
    pipe = make_pipeline()
    expected = pixels(sample_images(pipe, tmp_path / "one", 8))
    made = []
    for rank in (1, 0):
        monkeypatch.setattr(sampling, "PartialState", lambda rank=rank: FakeState(rank))
        sample_images(pipe, tmp_path / "two", 8, batch_size=3)
        made.append({file.name for file in (tmp_path / "two").glob("*.png")})
    assert made[0] == {f"{i:06d}.png" for i in (1, 3, 5, 7)} and len(made[1]) == 8
    assert (pixels(sorted((tmp_path / "two").glob("*.png"))) == expected).all()


class FakeState:
    """One of two processes; rank 1 finds the folder as rank 0 has left it."""

    num_processes = 2

    def __init__(self, rank):
        self.process_index, self.is_main_process = rank, True

    def main_process_first(self):
        from contextlib import nullcontext

        return nullcontext()

    def wait_for_everyone(self):
        pass


@pytest.mark.parametrize("change", ["seed", "sampling", "weights"])
def test_samples_made_otherwise_are_not_mixed(make_pipeline, tmp_path, change):
    pipe = make_pipeline()
    sample_images(pipe, tmp_path, 4)
    if change == "weights":
        with torch.no_grad():
            next(pipe.transformer.parameters()).view(-1)[0] += 1
    arguments = {"seed": dict(seed=1), "sampling": dict(sampling={"temperature": 0.5}), "weights": {}}[change]
    with pytest.raises(ValueError, match=f"samples of other settings: {change}"):
        sample_images(pipe, tmp_path, 4, **arguments)


def test_labels_that_cannot_be_balanced_are_refused(make_pipeline, tmp_path):
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=r"7 images cannot be divided equally among 4 classes.*such as 8"):
        sample_images(pipe, tmp_path, 7)
    for arguments in (dict(seed=-1), dict(batch_size=0)):
        with pytest.raises(ValueError, match="must not be negative"):
            sample_images(pipe, tmp_path, 4, **arguments)
    assert not list(tmp_path.iterdir())


def test_the_npz_has_the_images_in_order_as_the_adm_suite_reads_them(image_folder, tmp_path):
    folder, levels = image_folder
    files = sorted(folder.rglob("*.png"))
    write_npz(files, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].dtype == np.uint8
        assert (arrays["arr_0"] == levels).all()
    Image.new("RGB", (5, 4)).save(folder / "3.png")
    with pytest.raises(ValueError, match=r"3.png is of \(5, 4\) pixels"):
        write_npz(sorted(folder.rglob("*.png")), tmp_path / "samples.npz")
