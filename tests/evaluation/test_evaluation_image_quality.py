"""PSNR and SSIM, against scikit-image."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dnd_hf.evaluation.image_quality import psnr, ssim


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def skimage_ssim(a: np.ndarray, b: np.ndarray) -> float:
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return structural_similarity(a, b, channel_axis=-1, data_range=255, **settings)


@pytest.fixture
def pairs():
    """(images, worse ones): smooth noise, noise added, all of one level, shifted by one level; 23 x 31 pixels."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.uniform(0, 255, (4, 23, 31, 3)), (0, 3, 3, 0))
    images = np.clip((smooth - 127.5) * 8 + 127.5, 0, 254).round().astype(np.uint8)
    worse = images.copy()
    worse[0] = ndimage.gaussian_filter(images[0], (2, 2, 0))
    worse[1] = np.clip(images[1] + rng.normal(0, 20, images[1].shape), 0, 255)
    worse[2] = 90
    worse[3] = images[3] + 1
    return images, worse


def test_psnr_is_that_of_scikit_image_and_infinite_for_equal_images(pairs):
    images, worse = pairs
    expected = [peak_signal_noise_ratio(a, b) for a, b in zip(images, worse)]
    np.testing.assert_allclose(psnr(as_tensor(worse), as_tensor(images)), expected)
    assert expected[3] == pytest.approx(48.13, abs=0.01)
    assert psnr(as_tensor(images), as_tensor(images)).isinf().all()


def test_ssim_is_that_of_scikit_image(pairs):
    images, worse = pairs
    expected = [skimage_ssim(a, b) for a, b in zip(images, worse)]
    np.testing.assert_allclose(ssim(as_tensor(worse), as_tensor(images)), expected, atol=1e-6)
    assert min(expected) < 0.5 < 0.99 < max(expected)


def test_ssim_of_images_smaller_than_its_window_is_refused():
    small = torch.zeros(1, 3, 10, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(small, small)
