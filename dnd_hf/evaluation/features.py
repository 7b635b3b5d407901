"""Distances between sets of images, from features of a network: FID, Inception Score, precision and recall."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel


NEIGHBOURS = 3
"""Precision and recall look at the third nearest image, as arXiv 1904.06991 and the ADM suite."""


class Features(NamedTuple):
    """What a feature extractor makes of n images: `features` (n, dim) and, of Inception, `logits` (n, 1008)."""

    features: Tensor
    logits: Tensor | None


class InceptionFeatures(nn.Module):
    """The Inception v3 of 2015 that the ADM evaluation suite runs, from `torch-fidelity`, with its resizing.

    Call with `(n, 3, H, W)` uint8; returns [`Features`] of 2048 dimensions and the logits without bias.

    Args:
        weights: file of its weights in torch-fidelity's format (`weights-inception-2015-12-05-6726825d.pth`); where
            None, torch-fidelity downloads it.

    Raises:
        ImportError: torch-fidelity, or the torchvision it needs, cannot be imported.
        FileNotFoundError: there is no such file.
    """

    name = "inception-v3-2015-12-05"

    def __init__(self, weights: str | None = None):
        super().__init__()
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
            raise ImportError(
                "Inception features need torch-fidelity and a torchvision that fits the installed torch:"
                f' pip install ".[fid]" in a clone of dnd_hf ({error}). A `feature_model` needs neither.'
            ) from error
        self.network = FeatureExtractorInceptionV3(
            self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Features:
        return Features(*self.network(images))


class ModelFeatures(nn.Module):
    """Features of any image model of transformers: its pooled output, or the mean of its last hidden states.

    Call with `(n, 3, H, W)` uint8; the model's own image processor scales them. Returns [`Features`] without logits.

    Args:
        model: folder or Hub id of a model that `AutoModel` and `AutoImageProcessor` load.

    Raises:
        ValueError: they cannot load it.
    """

    def __init__(self, model: str):
        super().__init__()
        try:
            self.processor = AutoImageProcessor.from_pretrained(model)
            network = AutoModel.from_pretrained(model, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{model!r} is no image model that transformers can load: {error}") from error
        self.network = getattr(network, "vision_model", network).eval()
        self.name = model

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Features:
        # Arrays, channels last: with tensors some processors do not know which axis is which.
        arrays = list(images.permute(0, 2, 3, 1).cpu().numpy())
        pixels = self.processor(images=arrays, input_data_format="channels_last", return_tensors="pt").pixel_values
        output = self.network(pixel_values=pixels.to(self.network.device))
        features = getattr(output, "pooler_output", None)
        if features is None:
            hidden = output.last_hidden_state
            features = hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
        return Features(features.flatten(1).float(), None)


class GaussianStatistics:
    """Mean and covariance of features that come in batches; sums in float64, where the features are (not on mps)."""

    def __init__(self):
        self.count = 0
        self.sum: Tensor = torch.zeros(())
        self.products: Tensor = torch.zeros(())

    def update(self, features: Tensor) -> None:
        """Adds features (n, dim)."""
        features = (features.cpu() if features.device.type == "mps" else features).double()
        self.count += len(features)
        self.sum = self.sum.to(features) + features.sum(0)
        self.products = self.products.to(features) + features.T @ features

    @property
    def mean(self) -> Tensor:
        """(dim,) float64, on the CPU."""
        return self.sum.cpu() / self.count

    @property
    def covariance(self) -> Tensor:
        """(dim, dim) float64, on the CPU, divided by n - 1. Raises ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, got {self.count}.")
        return (self.products.cpu() - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


class KnownStatistics(NamedTuple):
    """Mean (dim,) and covariance (dim, dim), float64, as a reference file gives them."""

    mean: Tensor
    covariance: Tensor


Statistics = GaussianStatistics | KnownStatistics


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` (FID, arXiv 1706.08500, Equation 6), at least 0.

    Raises:
        ValueError: the features have different sizes, or one side has fewer than two images.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"the features have {len(first.mean)} and {len(second.mean)} dimensions: they are of different networks."
        )
    a, b = first.covariance, second.covariance
    # C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), whose roots are safe where C1 is singular.
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    distance = (first.mean - second.mean).square().sum() + a.trace() + b.trace() - 2 * trace
    return max(0.0, distance.item())


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """`exp(mean KL(p(y|x) || p(y)))` (arXiv 1606.03498): mean and population deviation over consecutive parts.

    Args:
        logits: (n, classes), n at least `splits`.
        splits: parts of about n / splits images; p(y) is that of the part. ADM has 10 of 5,000.

    Raises:
        ValueError: fewer images than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"an Inception Score of {splits} parts needs as many images, got {len(logits)}.")
    scores = []
    for part in logits.double().log_softmax(1).tensor_split(splits):
        marginal = part.exp().mean(0, keepdim=True)
        scores.append((part.exp() * (part - marginal.log())).sum(1).mean().exp())
    stacked = torch.stack(scores)
    return stacked.mean().item(), stacked.std(correction=0).item()


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): shares of generated (real) images among real (generated).

    An image is among others if it is no farther from one of them than that one's third nearest other.

    Args:
        real, generated: features (n, dim) and (m, dim), on the device where distances are to be computed.
        neighbours: k of the k-th nearest.

    Raises:
        ValueError: a side has no more than `neighbours` images.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(
            f"precision and recall need more than {neighbours} images, got {len(real)} real and {len(generated)}."
        )
    center = real.mean(0)  # distances between nearer numbers lose less to rounding
    real, generated = real - center, generated - center

    def radii(points: Tensor) -> Tensor:
        # The nearest of all is the point itself.
        nearest = (torch.cdist(part, points).kthvalue(neighbours + 1).values for part in points.split(1024))
        return torch.cat(list(nearest))

    def share_covered(points: Tensor, others: Tensor) -> float:
        reach = radii(others)
        covered = [(torch.cdist(part, others) <= reach).any(1) for part in points.split(1024)]
        return torch.cat(covered).double().mean().item()

    return share_covered(generated, real), share_covered(real, generated)
