"""Losses of the tokenizer's training: hinge GAN losses, their adaptive weight, and LPIPS."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class PerceptualLoss(nn.Module):
    """LPIPS with the VGG network (arXiv 1801.03924), frozen, in float32.

    `loss(a, b)` takes images `(batch, 3, H, W)` in [-1, 1] and returns the scalar mean distance. The weights are
    downloaded where torchvision keeps its own, when the object is made.

    Raises:
        ImportError: `lpips` or the torchvision it needs is not installed, or does not fit the installed PyTorch.
        OSError: the weights are not there and cannot be downloaded.
    """

    def __init__(self):
        super().__init__()
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # a torchvision of another PyTorch raises either
            raise ImportError(f'the perceptual loss needs LPIPS: pip install "dnd-hf[lpips]" ({error})') from error
        try:
            network = lpips.LPIPS(net="vgg", verbose=False)
        except OSError as error:
            raise OSError(
                "the perceptual loss needs the VGG of torchvision, not downloaded: put vgg16-397923af.pth"
                f" into {torch.hub.get_dir()}/checkpoints, or train with --lpips_weight 0 ({error})"
            ) from error
        self.network = network.requires_grad_(False).eval()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images.float(), targets.float()).mean()
