"""Soft targets and stochastic codes from a tokenizer (arXiv 2203.01941, Section 3.2.3), for either architecture."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.autoencoder_rqvae import RQVAE
from ..ops.linear_cross_entropy import LOGITS_AT_ONCE
from ..ops.number_checks import check_positive
from ..ops.soft_targets import SoftTargets, soft_code_probabilities


@torch.no_grad()
def soft_codes(
    vqvae: RQVAE,
    images: Tensor,
    temperature: float = 0.5,
    stochastic: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, SoftTargets]:
    """The codes that a transformer reads of images, and the distributions that it learns to predict.

    Args:
        vqvae: the tokenizer; it is not trained.
        images: `(batch, 3, H, W)` in [-1, 1].
        temperature: tau of the distributions, greater than 0.
        stochastic: the codes are drawn from the distributions, depth by depth, each of what the lower ones left;
            False: they are the nearest ones, those of `vqvae.encode`.
        generator: of the draws.

    Returns:
        Codes `(batch, height, width, depth)` int64, and the targets: `model(labels, codes, soft_targets=targets)`.

    Raises:
        ValueError: a temperature out of its range, or images that the tokenizer does not take.
    """
    check_positive("temperature", temperature)
    encoded, quantizer = vqvae.encode(images), vqvae.quantizer
    vectors = vqvae.cell_vectors(encoded.latents).float()
    residual, residuals, codes = vectors.flatten(0, 2), [], []
    for k in range(quantizer.depth):
        residuals.append(residual)
        if stochastic:
            codes.append(_draw(residual, quantizer.codebook(k), temperature, generator))
        else:
            codes.append(encoded.codes[..., k].flatten())
        residual = residual - F.embedding(codes[k], quantizer.codebook(k))
    shape = vectors.shape[:-1]
    codebooks = torch.stack([quantizer.codebook(k) for k in range(1 if quantizer.shared else quantizer.depth)])
    targets = SoftTargets(torch.stack(residuals, dim=1).view(*shape, quantizer.depth, -1), codebooks, temperature)
    return torch.stack(codes, dim=1).view(*shape, quantizer.depth), targets


def _draw(residuals: Tensor, codebook: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A code for each of `(rows, dim)` residuals; at most `LOGITS_AT_ONCE` probabilities exist at a time."""
    pieces = residuals.split(max(1, LOGITS_AT_ONCE // len(codebook)))
    drawn = [
        soft_code_probabilities(piece, codebook, temperature).multinomial(1, generator=generator) for piece in pieces
    ]
    return torch.cat(drawn).squeeze(1)
