"""LPIPS, the distance of images that a trained network sees: a loss of training, a metric of evaluation."""

import torch
from torch import Tensor, nn


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
            raise ImportError(
                f'the perceptual loss needs LPIPS: pip install ".[lpips]" in a clone of dnd_hf ({error})'
            ) from error
        try:
            network = lpips.LPIPS(net="vgg", verbose=False)
        except OSError as error:
            raise OSError(
                "the perceptual loss needs the VGG of torchvision, not downloaded: put vgg16-397923af.pth"
                f" into {torch.hub.get_dir()}/checkpoints, or do without this loss ({error})"
            ) from error
        self.network = network.requires_grad_(False).eval()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images.float(), targets.float()).mean()
