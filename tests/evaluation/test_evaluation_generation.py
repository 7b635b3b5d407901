"""Samples for evaluation: which pictures they are, that they can go on, what is written of them, and presets."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dnd_hf.data.images import BrokenImageError
from dnd_hf.evaluation import generation
from dnd_hf.evaluation.features import Features, frechet_distance, inception_score, precision_recall
from dnd_hf.evaluation.generation import (
    choose_presets,
    extract_features,
    gaussian,
    guidance_settings,
    measure_samples,
    read_reference_statistics,
    sample_images,
    write_npz,
)
from dnd_hf.evaluation.images import SampleImages, read_batches


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
        monkeypatch.setattr(generation, "PartialState", lambda rank=rank: FakeState(rank))
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
    with pytest.raises(ValueError, match=f"samples with other {change}"):
        sample_images(pipe, tmp_path, 4, **arguments)


def test_labels_that_can_not_be_balanced_are_refused(make_pipeline, tmp_path):
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=r"7 pictures can not be divided equally among 4 classes.*such as 8"):
        sample_images(pipe, tmp_path, 7)
    for arguments in (dict(seed=-1), dict(batch_size=0)):
        with pytest.raises(ValueError, match="must not be negative"):
            sample_images(pipe, tmp_path, 4, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def picture_folder(tmp_path):
    """Five random pictures, 6 x 4 pixels (width x height)."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    levels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    names = ["0.png", "1.png", "2.png", "deeper/0.png", "deeper/1.png"]
    for name, array in zip(names, levels):
        Image.fromarray(array).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder, levels


def test_the_npz_has_the_pictures_in_order_as_the_adm_suite_reads_them(picture_folder, tmp_path):
    folder, levels = picture_folder
    files = sorted(folder.rglob("*.png"))
    write_npz(files, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].dtype == np.uint8
        assert (arrays["arr_0"] == levels).all()
    Image.new("RGB", (5, 4)).save(folder / "3.png")
    with pytest.raises(ValueError, match=r"3.png is of \(5, 4\) pixels"):
        write_npz(sorted(folder.rglob("*.png")), tmp_path / "samples.npz")


def test_samples_are_read_from_a_folder_and_from_an_npz_alike(picture_folder, tmp_path):
    folder, levels = picture_folder
    np.savez(tmp_path / "a.npz", arr_0=levels)
    for path in (folder, tmp_path / "a.npz"):
        dataset = SampleImages(path)
        read = torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])
        assert (((read + 1) * 127.5).round().permute(0, 2, 3, 1).numpy() == levels).all()
        assert len(SampleImages(path, 2)) == 2
        with pytest.raises(ValueError, match="has 5 pictures; there must be at least 6"):
            SampleImages(path, 6)


def test_samples_that_can_not_be_read_or_have_another_size_are_listed(picture_folder):
    folder, _ = picture_folder
    (folder / "0.png").write_bytes(b"torn")
    Image.new("RGB", (6, 5)).save(folder / "2.png")
    dataset, failures = SampleImages(folder), []
    batches = list(read_batches(dataset, 2, failures))
    assert [index for indices, _, _ in batches for index in indices] == [1, 3, 4]
    assert [failure.index for failure in failures] == [0, 2]
    assert "0.png" in failures[0].reason and "(6, 5) pixels, others of (6, 4)" in failures[1].reason
    with pytest.raises(BrokenImageError):
        dataset[0]


def test_what_holds_no_samples_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has 0 pictures"):
        SampleImages(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"neither a folder of pictures nor an .npz"):
        SampleImages(tmp_path / "nowhere")
    for name, arrays in {"floats": dict(arr_0=np.zeros((2, 4, 4, 3))), "other": dict(mu=np.zeros(3))}.items():
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(ValueError, match="must hold `arr_0`, uint8"):
            SampleImages(tmp_path / f"{name}.npz")


def corner(images: torch.Tensor) -> Features:
    return Features(images[:, :, 0, 0].float(), images[:, 0, 0].float() / 50)


def test_features_of_all_pictures_are_those_of_each_whatever_the_batch(picture_folder):
    folder, levels = picture_folder
    failures = []
    features, logits = extract_features(corner, SampleImages(folder), 2, failures)
    assert features.tolist() == levels[:, 0, 0].tolist() and failures == []
    torch.testing.assert_close(logits, torch.from_numpy(levels[:, 0, :, 0]) / 50)


def test_samples_are_measured_against_features_or_known_statistics(tmp_path):
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(30, 3, generator=generator) + shift for shift in (0.0, 0.5))
    logits = torch.randn(30, 4, generator=generator)
    found = measure_samples(Features(fake, logits), Features(real, None))
    assert found["fid"] == pytest.approx(frechet_distance(gaussian(fake), gaussian(real)))
    assert (found["precision"], found["recall"]) == pytest.approx(precision_recall(real, fake))
    assert (found["inception_score"], found["inception_score_std"]) == pytest.approx(inception_score(logits))
    assert found["num_images"] == 30
    np.savez(tmp_path / "reference.npz", mu=real.mean(0).numpy(), sigma=np.cov(real.T.double().numpy()))
    statistics = read_reference_statistics(tmp_path / "reference.npz")
    known = measure_samples(Features(fake, None), None, statistics)
    assert known["fid"] == pytest.approx(found["fid"], rel=1e-4)
    assert known["precision"] is known["inception_score"] is None
    np.savez(tmp_path / "pictures.npz", arr_0=np.zeros((1, 4, 4, 3), np.uint8))
    assert read_reference_statistics(tmp_path / "pictures.npz") is None
    with pytest.raises(ValueError, match="needs features or statistics of real pictures"):
        measure_samples(Features(fake, None), None)


def test_guidance_settings_are_all_combinations_with_powers_where_they_matter():
    settings = guidance_settings([1.5, 2.0], ["constant", "power-cosine"], [1.2, 2.75])
    assert len(settings) == 2 + 4 and all(len(setting) == 2 for setting in settings[:2])
    assert {setting["guidance_power"] for setting in settings[2:]} == {1.2, 2.75}
    assert settings[0] == {"guidance_scale": 1.5, "guidance_schedule": "constant"}


def test_presets_are_the_lowest_fid_and_the_highest_precision():
    rows = [
        {"guidance_scale": 1.5, "guidance_schedule": "constant", "fid": 3.0, "precision": 0.7},
        {"guidance_scale": 2.0, "guidance_schedule": "constant", "fid": 2.6, "precision": 0.8},
        {
            "guidance_scale": 6.0,
            "guidance_schedule": "power-cosine",
            "guidance_power": 1.2,
            "fid": 9.0,
            "precision": 0.9,
        },
        {"guidance_scale": 4.0, "guidance_schedule": "constant", "fid": 6.5, "precision": 0.9},
    ]
    assert choose_presets(rows) == {
        "fid": {"guidance_scale": 2.0, "guidance_schedule": "constant"},
        "visual": {"guidance_scale": 4.0, "guidance_schedule": "constant"},
    }
    rows[3]["fid"] = 9.5
    assert choose_presets(rows)["visual"]["guidance_power"] == 1.2
    assert json.loads(json.dumps(choose_presets(rows))) == choose_presets(rows)
