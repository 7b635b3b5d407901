"""How near an image is to its original: PSNR and SSIM."""

from collections.abc import Callable

import torch
from torch import Tensor


def psnr(levels: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, dB: `10 log10(255^2 / mean squared error)`; inf for equal ones.

    Args:
        levels, targets: `(n, 3, H, W)` uint8.

    Returns:
        `(n,)` float64.
    """
    errors = (levels.double() - targets.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / errors)


def ssim(levels: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, mean of RGB.

    As in that paper and in scikit-image, over the places where the window lies within the image.

    Args:
        levels, targets: `(n, 3, H, W)` uint8, at least 11 pixels high and wide.

    Returns:
        `(n,)` float64 in [-1, 1].

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: smaller images.
    """
    structural_similarity_index_measure = import_ssim()
    if min(levels.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 pixels each way, got {tuple(levels.shape[2:])}.")
    _, everywhere = structural_similarity_index_measure(
        levels.double(), targets.double(), sigma=1.5, data_range=255.0, reduction="none", return_full_image=True
    )
    return everywhere[:, :, 5:-5, 5:-5].mean((1, 2, 3))  # torchmetrics pads the borders and counts them too


def import_ssim() -> Callable:
    """The function of torchmetrics; ImportError, saying what to install, without it."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError('SSIM needs torchmetrics: pip install ".[eval]" in a clone of dnd_hf') from error
    return structural_similarity_index_measure
