"""The metrics of reconstructions, against plain loops with scikit-image and scipy."""

import sys

import numpy as np
import pytest
import torch
from scipy import linalg
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dnd_hf.data.images import BrokenImageError
from dnd_hf.evaluation.features import Features
from dnd_hf.evaluation.reconstruction import evaluate_reconstruction


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def skimage_ssim(a: np.ndarray, b: np.ndarray) -> float:
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return structural_similarity(a, b, channel_axis=-1, data_range=255, **settings)


class Images:
    """Random images of 12 x 16 pixels whose levels are whole; those of `broken` cannot be read."""

    def __init__(self, count, broken=()):
        self.levels = np.random.default_rng(1).integers(0, 256, (count, 12, 16, 3), np.uint8)
        self.broken = broken

    def __len__(self):
        return len(self.levels)

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImageError(index, None, "it is torn")
        return {"pixel_values": as_tensor(self.levels[index : index + 1])[0] / 127.5 - 1, "label": 0}


def corners(images: torch.Tensor) -> Features:
    """Features of dimension 3: the mean levels of the upper left corner."""
    return Features(images[:, :, :6, :8].float().mean((2, 3)), None)


def first_difference(a, b):
    return (a[:, :, 0, 0] - b[:, :, 0, 0]).abs().mean()


def close(row, other):
    numbers = [{name: value for name, value in row.items() if value is not None} for row in (row, other)]
    return row.keys() == other.keys() and numbers[0] == pytest.approx(numbers[1], rel=1e-4)


def test_every_metric_of_every_depth_is_that_of_a_plain_loop_over_the_images(make_vae):
    vae, dataset = make_vae(sample_size=(12, 16)), Images(7)
    found = evaluate_reconstruction(vae, dataset, None, 3, first_difference, corners)
    images = torch.stack([dataset[i]["pixel_values"] for i in range(7)])
    with torch.no_grad():
        codes = vae.encode(images).codes
        samples = [vae.decode_codes(codes, depth=k).sample.clamp(-1, 1) for k in (1, 2)]
    assert [row["depth"] for row in found["rows"]] == [1, 2] and found["num_images"] == 7
    for row, sample in zip(found["rows"], samples):
        levels = ((sample + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        both = list(zip(dataset.levels, levels))
        assert row["psnr"] == pytest.approx(np.mean([peak_signal_noise_ratio(a, b) for a, b in both]), rel=1e-4)
        assert row["ssim"] == pytest.approx(np.mean([skimage_ssim(a, b) for a, b in both]), abs=1e-4)
        assert row["l2"] == pytest.approx((sample - images).square().mean().item(), rel=1e-5)
        assert row["lpips"] == pytest.approx(first_difference(sample, images).item(), rel=1e-5)
        a, b = (corners(as_tensor(x)).features.double().numpy() for x in (dataset.levels, levels))
        root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        fid = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
        assert row["rfid"] == pytest.approx(fid, rel=1e-4)
        assert row["icr"] == pytest.approx(row["depth"] * np.log2(11) / 96)
    for k, statistics in enumerate(found["codes"]):
        used = codes[..., k].flatten()
        assert statistics["depth"] == k + 1 and statistics["usage"] == len(used.unique()) / 11
        assert statistics["norm_mean"] == pytest.approx(vae.quantizer.codebook(k)[used].norm(dim=1).mean().item())
    assert found["usage"] == len(codes.unique()) / 11


def test_metrics_depend_on_no_batch_size_and_a_chosen_depth_is_measured_alone(make_vae):
    vae, images = make_vae(sample_size=(12, 16)), Images(5)
    whole = evaluate_reconstruction(vae, images, batch_size=5)
    single = evaluate_reconstruction(vae, images, [2], batch_size=2)
    assert [row["depth"] for row in single["rows"]] == [2]
    assert close(single["rows"][0], whole["rows"][1])
    assert single["codes"] == whole["codes"]
    assert whole["rows"][0]["lpips"] is None and whole["rows"][0]["rfid"] is None


def test_broken_images_are_listed_and_have_no_part_in_any_metric(make_vae):
    vae = make_vae(sample_size=(12, 16))
    torn = Images(4, broken=[1])
    found = evaluate_reconstruction(vae, torn, batch_size=2)
    rest = torch.utils.data.Subset(torn, [0, 2, 3])
    assert found["num_images"] == 3
    assert [(failure.index, failure.stage) for failure in found["failures"]] == [(1, "open")]
    assert close(found["rows"][1], evaluate_reconstruction(vae, rest)["rows"][1])
    with pytest.raises(ValueError, match=r"none of 2 images can be read.*it is torn"):
        evaluate_reconstruction(vae, Images(2, broken=[0, 1]))


def test_without_torchmetrics_the_error_says_what_to_install_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r"\.\[eval\]"):
        evaluate_reconstruction(None, None)
