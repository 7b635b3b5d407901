"""Measures of reconstructions and of codes, against scikit-image, scipy and cases worked by hand."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage, stats
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dnd_hf.data.images import BrokenImageError
from dnd_hf.evaluation.features import Features
from dnd_hf.evaluation.reconstruction import (
    QUANTILES,
    check_depths,
    code_statistics,
    evaluate_reconstruction,
    information_compression_ratio,
    psnr,
    ssim,
)


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def skimage_ssim(a: np.ndarray, b: np.ndarray) -> float:
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return structural_similarity(a, b, channel_axis=-1, data_range=255, **settings)


@pytest.fixture
def pairs():
    """(pictures, worse ones): smooth noise, noise added, all of one level, shifted by one level; 23 x 31 pixels."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.uniform(0, 255, (4, 23, 31, 3)), (0, 3, 3, 0))
    pictures = np.clip((smooth - 127.5) * 8 + 127.5, 0, 254).round().astype(np.uint8)
    worse = pictures.copy()
    worse[0] = ndimage.gaussian_filter(pictures[0], (2, 2, 0))
    worse[1] = np.clip(pictures[1] + rng.normal(0, 20, pictures[1].shape), 0, 255)
    worse[2] = 90
    worse[3] = pictures[3] + 1
    return pictures, worse


def test_psnr_is_that_of_scikit_image_and_infinite_for_equal_pictures(pairs):
    pictures, worse = pairs
    expected = [peak_signal_noise_ratio(a, b) for a, b in zip(pictures, worse)]
    np.testing.assert_allclose(psnr(as_tensor(worse), as_tensor(pictures)), expected)
    assert expected[3] == pytest.approx(48.13, abs=0.01)
    assert psnr(as_tensor(pictures), as_tensor(pictures)).isinf().all()


def test_ssim_is_that_of_scikit_image(pairs):
    pictures, worse = pairs
    expected = [skimage_ssim(a, b) for a, b in zip(pictures, worse)]
    np.testing.assert_allclose(ssim(as_tensor(worse), as_tensor(pictures)), expected, atol=1e-6)
    assert min(expected) < 0.5 < 0.99 < max(expected)


def test_ssim_of_pictures_smaller_than_its_window_is_refused():
    small = torch.zeros(1, 3, 10, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(small, small)


@pytest.mark.parametrize(
    ("vocab_size", "depth", "stride", "ratio"),
    [
        (8192, 1, (16, 16), 0.0021158854),  # the paper's 0.21 %: 13 / (24 * 256)
        (16384, 8, (16, 16), 112 / 6144),
        (512, 4, (8, 8), 36 / 1536),
        (4096, 1, (24, 8), 12 / 4608),
    ],
)
def test_the_compression_ratio_is_that_of_the_formula(vocab_size, depth, stride, ratio):
    assert information_compression_ratio(vocab_size, depth, stride) == pytest.approx(ratio)


@pytest.mark.parametrize("counts", [[5, 0, 1, 3, 11, 0], [1, 0, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2]])
def test_statistics_of_codes_are_those_of_all_codes_that_occur(counts):
    norms = np.array([0.5, 9.0, 2.0, 0.1, 1.0, 7.0])
    found = code_statistics(torch.tensor(counts), torch.tensor(norms))
    occurring = np.repeat(norms, counts)
    assert found["usage"] == pytest.approx(np.count_nonzero(counts) / 6)
    assert found["perplexity"] == pytest.approx(np.exp(stats.entropy(counts)))
    assert found["norm_mean"] == pytest.approx(occurring.mean())
    assert found["norm_std"] == pytest.approx(occurring.std(), abs=1e-9)
    assert found["norm_quantiles"] == np.quantile(occurring, QUANTILES, method="inverted_cdf").tolist()


class Pictures:
    """Random pictures of 12 x 16 pixels whose levels are whole; those of `broken` can not be read."""

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


def test_every_measure_of_every_depth_is_that_of_a_plain_loop_over_the_pictures(make_vae):
    vae, pictures = make_vae(sample_size=(12, 16)), Pictures(7)
    found = evaluate_reconstruction(vae, pictures, None, 3, first_difference, corners)
    images = torch.stack([pictures[i]["pixel_values"] for i in range(7)])
    with torch.no_grad():
        codes = vae.encode(images).codes
        samples = [vae.decode_codes(codes, depth=k).sample.clamp(-1, 1) for k in (1, 2)]
    assert [row["depth"] for row in found["rows"]] == [1, 2] and found["num_images"] == 7
    for row, sample in zip(found["rows"], samples):
        levels = ((sample + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        both = list(zip(pictures.levels, levels))
        assert row["psnr"] == pytest.approx(np.mean([peak_signal_noise_ratio(a, b) for a, b in both]), rel=1e-4)
        assert row["ssim"] == pytest.approx(np.mean([skimage_ssim(a, b) for a, b in both]), abs=1e-4)
        assert row["l2"] == pytest.approx((sample - images).square().mean().item(), rel=1e-5)
        assert row["lpips"] == pytest.approx(first_difference(sample, images).item(), rel=1e-5)
        a, b = (corners(as_tensor(x)).features.double().numpy() for x in (pictures.levels, levels))
        root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        fid = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
        assert row["rfid"] == pytest.approx(fid, rel=1e-4)
        assert row["icr"] == pytest.approx(row["depth"] * np.log2(11) / 96)
    for k, statistics in enumerate(found["codes"]):
        used = codes[..., k].flatten()
        assert statistics["depth"] == k + 1 and statistics["usage"] == len(used.unique()) / 11
        assert statistics["norm_mean"] == pytest.approx(vae.quantizer.codebook(k)[used].norm(dim=1).mean().item())
    assert found["usage"] == len(codes.unique()) / 11


def test_figures_depend_on_no_batch_size_and_a_chosen_depth_is_measured_alone(make_vae):
    vae, pictures = make_vae(sample_size=(12, 16)), Pictures(5)
    whole = evaluate_reconstruction(vae, pictures, batch_size=5)
    single = evaluate_reconstruction(vae, pictures, [2], batch_size=2)
    assert [row["depth"] for row in single["rows"]] == [2]
    assert close(single["rows"][0], whole["rows"][1])
    assert single["codes"] == whole["codes"]
    assert whole["rows"][0]["lpips"] is None and whole["rows"][0]["rfid"] is None


def test_broken_pictures_are_listed_and_have_no_part_in_any_figure(make_vae):
    vae = make_vae(sample_size=(12, 16))
    torn = Pictures(4, broken=[1])
    found = evaluate_reconstruction(vae, torn, batch_size=2)
    rest = torch.utils.data.Subset(torn, [0, 2, 3])
    assert found["num_images"] == 3
    assert [(failure.index, failure.stage) for failure in found["failures"]] == [(1, "open")]
    assert close(found["rows"][1], evaluate_reconstruction(vae, rest)["rows"][1])
    with pytest.raises(ValueError, match=r"none of 2 pictures can be read.*it is torn"):
        evaluate_reconstruction(vae, Pictures(2, broken=[0, 1]))


def test_depths_are_sorted_and_kept_within_those_of_the_tokenizer():
    vae = SimpleNamespace(config=SimpleNamespace(code_depth=4))
    assert check_depths(vae, None) == check_depths(vae, []) == [1, 2, 3, 4]
    assert check_depths(vae, [4, 1, 4]) == [1, 4]
    for wrong in ([0], [5], [1, 5]):
        with pytest.raises(ValueError, match=r"depths must lie in \[1, 4\]"):
            check_depths(vae, wrong)


def test_without_torchmetrics_the_error_says_what_to_install_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r"dnd-hf\[eval\]"):
        evaluate_reconstruction(None, None)
