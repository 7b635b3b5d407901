"""Images to measure: read from folders and .npz files, broken ones listed."""

import numpy as np
import pytest
import torch
from PIL import Image

from dnd_hf.data.images import BrokenImageError
from dnd_hf.evaluation.images import SampleImages, read_batches


def test_samples_are_read_from_a_folder_and_from_an_npz_alike(image_folder, tmp_path):
    folder, levels = image_folder
    np.savez(tmp_path / "a.npz", arr_0=levels)
    for path in (folder, tmp_path / "a.npz"):
        dataset = SampleImages(path)
        read = torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])
        assert (((read + 1) * 127.5).round().permute(0, 2, 3, 1).numpy() == levels).all()
        assert len(SampleImages(path, 2)) == 2
        with pytest.raises(ValueError, match="has 5 images; there must be at least 6"):
            SampleImages(path, 6)


def test_transparent_samples_are_seen_on_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "0.png")
    assert (SampleImages(tmp_path)[0]["pixel_values"] == 1).all()


def test_samples_that_cannot_be_read_or_have_another_size_are_listed(image_folder):
    folder, _ = image_folder
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
    with pytest.raises(ValueError, match="has 0 images"):
        SampleImages(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"neither a folder of images nor an .npz"):
        SampleImages(tmp_path / "nowhere")
    for name, arrays in {"floats": dict(arr_0=np.zeros((2, 4, 4, 3))), "other": dict(mu=np.zeros(3))}.items():
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(ValueError, match="must hold `arr_0`, uint8"):
            SampleImages(tmp_path / f"{name}.npz")
