"""What a tokenizer keeps of images, with all its codes and with the first few, and how it uses its codebook."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

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
        None, "Measure rFID in reconstruction; default: where the features can be loaded; with --feature_model always."
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
    depths = check_depths(vae, depths)
    code_depth, vocab_size = vae.config.code_depth, vae.config.num_vq_embeddings
    counts = torch.zeros(code_depth, vocab_size, dtype=torch.int64)
    sums: dict[int, dict[str, float]] = {k: defaultdict(float) for k in depths}
    originals, statistics = GaussianStatistics(), {k: GaussianStatistics() for k in depths}
    failures: list[Failure] = []
    num_images = 0
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
