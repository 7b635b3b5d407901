"""What a tokenizer keeps of images, with all its codes and with the first few, and how it uses its codebook."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..figures import plot_codes, plot_curves
from ..models.autoencoder_rqvae import RQVAE
from ..ops.perceptual_loss import PerceptualLoss
from .code_usage import code_statistics, information_compression_ratio
from .features import GaussianStatistics, frechet_distance
from .image_quality import import_ssim, psnr, ssim
from .images import Failure, ImageItems, read_batches, to_levels
from .options import FeatureOptions, option
from .reports import Report
from .tokenizers import TokenizerOptions, check_depths


logger = logging.getLogger(__name__)


@dataclass
class ReconstructionOptions(TokenizerOptions, FeatureOptions):
    """Options of the task reconstruction."""

    lpips: bool | None = option(None, "Measure LPIPS in reconstruction; default: where it can be loaded.")
    fid: bool | None = option(
        None, "Measure rFID in reconstruction; default: where the features can be loaded; with `feature_model` always."
    )


def check(options: ReconstructionOptions) -> None:
    """Fills in the task's defaults. Raises ValueError for options that cannot work, before anything is loaded."""
    options.check_task("reconstruction")
    options.check_real_images("reconstruction")


def run(options: ReconstructionOptions) -> Report:
    """Reconstruction by each tokenizer, by depth, with grids, plots of the codes, and curves over several models."""
    report = Report(details={"features": None, "codes": []})
    perceptual_loss = _load(options.lpips, lambda: PerceptualLoss().to(options.run_device), "lpips", report)
    named = bool(options.feature_model or options.inception_weights)
    measure_fid = named or None if options.fid is None else options.fid
    extractor = _load(measure_fid, options.load_feature_extractor, "rfid", report)
    if extractor:
        report.details["features"] = extractor.name
    for number, (name, vae, dataset) in enumerate(options.open_tokenizers(), start=1):
        found = evaluate_reconstruction(
            vae, dataset, options.depths, options.batch_size, perceptual_loss, extractor, options.num_workers
        )
        codes = {row["depth"]: row for row in found["codes"]}
        for row in found["rows"]:
            kept = ("usage", "perplexity", "norm_mean", "norm_std")
            statistics = {f"code_{key}": codes[row["depth"]][key] for key in kept}
            report.rows.append({"model": name, **row, **statistics, "num_images": found["num_images"]})
        report.details["codes"].append({"model": name, "usage": found["usage"], "depths": found["codes"]})
        report.add_failures(name, found["failures"])
        report.images |= options.save_reconstructions(f"reconstructions-{number}.png", name, vae, dataset)
        plot_codes(found["codes"], options.folder / f"codes-{number}.png")
        report.images[f"codes-{number}.png"] = f"{name}: codes in use and their norms, by depth"
    if len(options.model) > 1:
        metrics = ("psnr", "ssim", "l2", "lpips", "rfid")
        plot_curves(report.rows, "depth", metrics, options.folder / "curves.png")
        report.images["curves.png"] = "The metrics of the models, by depth"
    return report


def _load(wanted: bool | None, load: Callable, metric: str, report: Report) -> Any:
    """What measures a metric: must be there where it is `wanted`, may be missing where None; the report says why."""
    if wanted is False:
        report.not_measured[metric] = "the options switch it off"
        return None
    try:
        return load()
    except (ImportError, OSError) as error:
        if wanted:
            raise
        report.not_measured[metric] = " ".join(str(error).split())
        logger.warning("%s is not measured: %s", metric, report.not_measured[metric])
        return None


@torch.inference_mode()
def evaluate_reconstruction(
    vae: RQVAE,
    dataset: ImageItems,
    depths: Sequence[int] | None = None,
    batch_size: int = 32,
    perceptual_loss: Callable | None = None,
    feature_extractor: Callable | None = None,
    num_workers: int = 0,
) -> dict:
    """Reconstructs images with the first 1, 2, ... codes of each position and measures what is left of them.

    Args:
        vae: the tokenizer, on the device where it is to run.
        dataset: items as of an `ImageDataset`, at a size that `vae` takes, at least 11 pixels each way.
        depths: numbers of codes to decode with, in `[1, vae.config.code_depth]`; every number where None.
        batch_size: images at once, at least 1; the metrics do not depend on it.
        perceptual_loss: a `PerceptualLoss` on the device of `vae`; without it there is no LPIPS.
        feature_extractor: of [`dnd_hf.evaluation.features`], on that device; without it there is no rFID.
        num_workers: processes that read the data set.

    Returns:
        `num_images` measured; `rows`, a dict for each of `depths`: `depth`, `psnr` and `ssim` (means over 8-bit
        images; dB), `l2` (mean squared error of pixels in [-1, 1], as in training), `lpips`, `rfid` (None where not
        measured) and `icr` ([`information_compression_ratio`]); `codes`, [`code_statistics`] for each depth of the
        tokenizer with its `depth`; `usage`, the share of all code vectors that occur at any depth; `failures`, a list
        of `Failure`, the broken images.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: a depth out of range, or no image can be read.
    """
    import_ssim()  # so that a missing package shows before the long work
    code_depth, vocab_size = vae.config.code_depth, vae.config.num_vq_embeddings
    counts = torch.zeros(code_depth, vocab_size, dtype=torch.int64)
    originals = GaussianStatistics() if feature_extractor else None
    qualities = {k: _Quality(perceptual_loss, feature_extractor) for k in check_depths(vae, depths)}
    failures: list[Failure] = []
    for _, images, _ in read_batches(dataset, batch_size, failures, num_workers, "Reconstruction"):
        images = images.to(vae.device)
        if feature_extractor and originals:
            originals.update(feature_extractor(to_levels(images))[0])
        codes = vae.encode(images.to(vae.dtype)).codes
        for k in range(code_depth):
            counts[k] += codes[..., k].flatten().bincount(minlength=vocab_size).cpu()
        for k, quality in qualities.items():
            quality.update(vae.decode_codes(codes, depth=k).sample.float().clamp(-1, 1), images)

    ratio = partial(information_compression_ratio, vocab_size, stride=vae.code_stride)
    norms = [vae.quantizer.codebook(k).norm(dim=1) for k in range(code_depth)]
    used = counts.sum(0) if vae.config.shared_codebook else counts
    return {
        "num_images": len(dataset) - len(failures),
        "rows": [{"depth": k, **quality.means(originals), "icr": ratio(k)} for k, quality in qualities.items()],
        "codes": [{"depth": k + 1, **code_statistics(counts[k], norms[k])} for k in range(code_depth)],
        "usage": (used > 0).double().mean().item(),
        "failures": failures,
    }


class _Quality:
    """Metrics of reconstructions, summed batch by batch."""

    def __init__(self, perceptual_loss: Callable | None, feature_extractor: Callable | None):
        self.perceptual_loss, self.feature_extractor = perceptual_loss, feature_extractor
        self.sums: dict[str, float] = defaultdict(float)
        self.statistics, self.num_images = GaussianStatistics(), 0

    def update(self, samples: Tensor, images: Tensor) -> None:
        """Adds reconstructions `(n, 3, H, W)` of images, both in [-1, 1]."""
        levels, targets = to_levels(samples), to_levels(images)
        self.num_images += len(images)
        self.sums["psnr"] += psnr(levels, targets).sum().item()
        self.sums["ssim"] += ssim(levels, targets).sum().item()
        self.sums["l2"] += F.mse_loss(samples, images).item() * len(images)
        if self.perceptual_loss:
            self.sums["lpips"] += self.perceptual_loss(samples, images).item() * len(images)
        if self.feature_extractor:
            self.statistics.update(self.feature_extractor(levels)[0])

    def means(self, originals: GaussianStatistics | None) -> dict[str, float | None]:
        """Each metric over all images, None where it is not measured; rFID against the originals' statistics."""
        sums = {name: self.sums.get(name) for name in ("psnr", "ssim", "l2", "lpips")}
        means = {name: None if total is None else total / self.num_images for name, total in sums.items()}
        rfid = None if originals is None else frechet_distance(self.statistics, originals)
        return means | {"rfid": rfid}
