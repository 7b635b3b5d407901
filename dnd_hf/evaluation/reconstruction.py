"""What a tokenizer keeps of pictures, with all its codes and with the first few, and how it uses its codebook."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import log2

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dnd_hf.models.autoencoder_rqvae import RQVAE

from .features import GaussianStatistics, frechet_distance
from .images import read_batches, to_levels


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def information_compression_ratio(vocab_size: int, depth: int, stride: tuple[int, int]) -> float:
    """Bits of the codes over bits of the 24-bit picture: `d log2(N) / (24 f^2)` (arXiv 2410.01912, Section 3.1).

    `stride` is (rows, columns), the pixels that one position stands for; their product is the paper's f^2.
    """
    return depth * log2(vocab_size) / (24 * stride[0] * stride[1])


def check_depths(vae: RQVAE, depths: Sequence[int] | None) -> list[int]:
    """`depths` in ascending order, each once; all of the tokenizer's where None. ValueError for one out of range."""
    limit = vae.config.code_depth
    chosen = sorted(set(depths or range(1, limit + 1)))
    if not 1 <= chosen[0] <= chosen[-1] <= limit:
        raise ValueError(f"depths must lie in [1, {limit}] with this tokenizer, got {list(depths)}.")
    return chosen


def code_perplexity(counts: Tensor) -> Tensor:
    """Exponential of the entropy (nats) of codes that occur `counts` `(..., codes)` times: `(...)`, in [1, codes]."""
    return torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1).exp()


def code_statistics(counts: Tensor, norms: Tensor) -> dict:
    """How the codes of one depth are used, and how long their vectors are (arXiv 2410.01912, Figure 4).

    Args:
        counts: (codes,), how often each code occurs; at least one does.
        norms: (codes,), the Euclidean length of each code's vector.

    Returns:
        `usage`, the share of codes that occur; `perplexity`, the exponential of the entropy of the code (nats), in
        [1, codes]; of the norms, each as often as its code occurs: `norm_mean`, `norm_std` (population) and
        `norm_quantiles`, those of `QUANTILES` (the smallest norm that at least this share does not exceed).
    """
    counts, norms = counts.double().cpu(), norms.double().cpu()
    shares = counts / counts.sum()
    mean = (shares * norms).sum()
    order = norms.argsort()
    cumulative = counts[order].cumsum(0)
    places = torch.searchsorted(cumulative, torch.tensor(QUANTILES).double() * cumulative[-1])
    return {
        "usage": (counts > 0).double().mean().item(),
        "perplexity": code_perplexity(counts).item(),
        "norm_mean": mean.item(),
        "norm_std": (shares * (norms - mean).square()).sum().sqrt().item(),
        "norm_quantiles": norms[order][places].tolist(),
    }


def psnr(levels: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, dB: `10 log10(255^2 / mean squared error)`; inf for equal ones.

    Args:
        levels, targets: `(n, 3, H, W)` uint8.

    Returns:
        `(n,)` float64.
    """
    errors = (levels.double() - targets.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / errors)


def ssim(levels: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each picture (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, mean of RGB.

    As in that paper and in scikit-image, over the places where the window lies within the picture.

    Args:
        levels, targets: `(n, 3, H, W)` uint8, at least 11 pixels high and wide.

    Returns:
        `(n,)` float64 in [-1, 1].

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: smaller pictures.
    """
    structural_similarity_index_measure = import_ssim()
    if min(levels.shape[2:]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11 pixels each way, got {tuple(levels.shape[2:])}.")
    _, everywhere = structural_similarity_index_measure(
        levels.double(), targets.double(), sigma=1.5, data_range=255.0, reduction="none", return_full_image=True
    )
    return everywhere[:, :, 5:-5, 5:-5].mean((1, 2, 3))  # torchmetrics pads the borders and counts them too


def import_ssim() -> Callable:
    """The function of torchmetrics; ImportError, saying what to install, without it."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError('SSIM needs torchmetrics: pip install "dnd-hf[eval]"') from error
    return structural_similarity_index_measure


@torch.inference_mode()
def evaluate_reconstruction(
    vae: RQVAE,
    dataset: Dataset,
    depths: Sequence[int] | None = None,
    batch_size: int = 32,
    perceptual_loss: Callable | None = None,
    feature_extractor: Callable | None = None,
    num_workers: int = 0,
) -> dict:
    """Reconstructs pictures with the first 1, 2, ... codes of each position and measures what is left of them.

    Args:
        vae: the tokenizer, on the device where it is to run.
        dataset: items as of an `ImageDataset`, at a size that `vae` takes, at least 11 pixels each way.
        depths: numbers of codes to decode with, in `[1, vae.config.code_depth]`; every number where None.
        batch_size: pictures at once, at least 1; the figures do not depend on it.
        perceptual_loss: a `PerceptualLoss` on the device of `vae`; without it there is no LPIPS.
        feature_extractor: of [`dnd_hf.evaluation.features`], on that device; without it there is no rFID.
        num_workers: processes that read the data set.

    Returns:
        `num_images` measured; `rows`, a dict for each of `depths`: `depth`, `psnr` and `ssim` (means over 8-bit
        pictures; dB), `l2` (mean squared error of pixels in [-1, 1], as in training), `lpips`, `rfid` (None where not
        measured) and `icr` ([`information_compression_ratio`]); `codes`, [`code_statistics`] for each depth of the
        tokenizer with its `depth`; `usage`, the share of all code vectors that occur at any depth; `failures`, a list
        of `Failure`, the broken pictures.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: a depth out of range, or no picture can be read.
    """
    import_ssim()  # so that a missing package shows before the long work
    depths = check_depths(vae, depths)
    code_depth, vocab_size = vae.config.code_depth, vae.config.num_vq_embeddings
    counts = torch.zeros(code_depth, vocab_size, dtype=torch.int64)
    sums = {k: defaultdict(float) for k in depths}
    originals, statistics = GaussianStatistics(), {k: GaussianStatistics() for k in depths}
    failures, num_images = [], 0
    for _, images, _ in read_batches(dataset, batch_size, failures, num_workers, "Reconstruction"):
        images = images.to(vae.device)
        targets = to_levels(images)
        num_images += len(images)
        if feature_extractor:
            originals.update(feature_extractor(targets)[0])
        codes = vae.encode(images.to(vae.dtype)).codes
        for k in range(code_depth):
            counts[k] += codes[..., k].flatten().bincount(minlength=vocab_size).cpu()
        for k in depths:
            sample = vae.decode_codes(codes, depth=k).sample.float().clamp(-1, 1)
            levels = to_levels(sample)
            sums[k]["psnr"] += psnr(levels, targets).sum().item()
            sums[k]["ssim"] += ssim(levels, targets).sum().item()
            sums[k]["l2"] += F.mse_loss(sample, images).item() * len(images)
            if perceptual_loss:
                sums[k]["lpips"] += perceptual_loss(sample, images).item() * len(images)
            if feature_extractor:
                statistics[k].update(feature_extractor(levels)[0])

    rows = [
        {
            "depth": k,
            **{name: sums[k][name] / num_images for name in ("psnr", "ssim", "l2")},
            "lpips": sums[k]["lpips"] / num_images if perceptual_loss else None,
            "rfid": frechet_distance(statistics[k], originals) if feature_extractor else None,
            "icr": information_compression_ratio(vocab_size, k, vae.code_stride),
        }
        for k in depths
    ]
    codes = [
        {"depth": k + 1, **code_statistics(counts[k], vae.quantizer.codebook(k).norm(dim=1))} for k in range(code_depth)
    ]
    used = counts.sum(0) if vae.config.shared_codebook else counts
    return {
        "num_images": num_images,
        "rows": rows,
        "codes": codes,
        "usage": (used > 0).double().mean().item(),
        "failures": failures,
    }
