"""Soft targets: cross-entropy against a distribution over the codebook that is computed piece by piece."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .linear_cross_entropy import LOGITS_AT_ONCE


@dataclass(frozen=True)
class SoftTargets:
    """For each code of a grid a distribution over all codes, the nearer the likelier (arXiv 2203.01941, Section 3.2.3).

    At depth k it is `softmax(-|r - c|^2 / temperature)` over the code vectors c, where the residual r is the latent
    vector minus the code vectors that the lower depths read.

    Args:
        residuals: `(batch, height, width, depth, dim)` float32.
        codebooks: `(1, vocab_size, dim)`, or `(depth, vocab_size, dim)` without a shared codebook; float32.
        temperature: tau, greater than 0; the paper's is 0.5. Towards 0 the nearest code has all probability.
    """

    residuals: Tensor
    codebooks: Tensor
    temperature: float

    def codebook(self, k: int) -> Tensor:
        """`(vocab_size, dim)` of depth k."""
        return self.codebooks[k if len(self.codebooks) > 1 else 0]

    def summed_cross_entropy(self, head: nn.Module, hidden: Tensor, k: int) -> Tensor:
        """Cross-entropy of `head(hidden)` against the targets of depth k, in nats and summed over all cells.

        At most `LOGITS_AT_ONCE` logits and as many probabilities exist at a time; for the gradients each piece is
        computed again in the backward pass.

        Args:
            head: makes `(rows, vocab_size)` logits of `(rows, hidden_size)`.
            hidden: `(rows, hidden_size)`, one row for each cell of each image.

        Returns:
            Scalar, float32.
        """
        codebook = self.codebook(k)

        def of_piece(rows: Tensor, residuals: Tensor) -> Tensor:
            probabilities = soft_code_probabilities(residuals, codebook, self.temperature)
            return -(probabilities * head(rows).float().log_softmax(-1)).sum()

        size = max(1, LOGITS_AT_ONCE // len(codebook))
        pieces = zip(hidden.split(size), self.residuals[..., k, :].flatten(0, 2).split(size))
        return torch.stack([checkpoint(of_piece, *piece, use_reentrant=False) for piece in pieces]).sum()


@torch.no_grad()
def soft_code_probabilities(residuals: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """`softmax(-|r - c|^2 / temperature)` over the codes, in float32 also under autocast.

    Args:
        residuals: `(rows, dim)`.
        codebook: `(vocab_size, dim)`.

    Returns:
        `(rows, vocab_size)`.
    """
    with torch.autocast(residuals.device.type, enabled=False):
        residuals, codebook = residuals.float(), codebook.float()
        # Without |r|^2, which is the same for every code.
        scores = torch.addmm(codebook.square().sum(1), residuals, codebook.T, beta=-1, alpha=2)
        return (scores / temperature).softmax(-1)


def check_targets(codes: Tensor, labels: Tensor | None, soft_targets: SoftTargets | None, vocab_size: int) -> None:
    """Raises ValueError where both kinds of targets are given, or soft ones that do not fit the codes."""
    if soft_targets is None:
        return
    if labels is not None:
        raise ValueError("`labels` must be None with `soft_targets`: there is one loss.")
    found, books = tuple(soft_targets.residuals.shape), tuple(soft_targets.codebooks.shape)
    fits = (
        found[:-1] == tuple(codes.shape) and books[0] in (1, codes.shape[-1]) and books[1:] == (vocab_size, found[-1])
    )
    if not fits:
        raise ValueError(
            f"`soft_targets` must have residuals {(*codes.shape, 'dim')} and codebooks (1 or {codes.shape[-1]},"
            f" {vocab_size}, dim), got {found} and {books}."
        )
