"""Losses of the tokenizer's training: hinge GAN losses and their adaptive weight."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Scalar `(mean(relu(1 - real)) + mean(relu(1 + fake))) / 2`; logits of any shape."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Scalar `-mean(fake)`; logits of any shape."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: Tensor,
    generator_loss: Tensor,
    last_layer: Tensor,
    reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    max_weight: float = 1e4,
) -> Tensor:
    """Weight that gives the GAN loss as large a gradient as the reconstruction loss (VQGAN, arXiv 2012.09841, Eq. 7).

    Args:
        reconstruction_loss, generator_loss: scalars whose graphs both contain `last_layer`; they can be used again.
        last_layer: weight of the decoder's last convolution.
        reduce: makes the gradient of the global batch from that of this process, so that every number of processes
            trains with the same weight.
        max_weight: upper bound, for gradients of the GAN loss near zero.

    Returns:
        Detached scalar in [0, max_weight]: `|grad reconstruction_loss| / (|grad generator_loss| + 1e-4)`.
    """
    norms = [
        reduce(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm()
        for loss in (reconstruction_loss, generator_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=max_weight).detach()
