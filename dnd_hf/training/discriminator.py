"""PatchGAN discriminator of the tokenizer's training (pix2pix, arXiv 1611.07004, Section 3.2.2)."""

import math

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Images `(batch, 3, H, W)` in [-1, 1] to one logit a patch, `(batch, 1, H / 2^n - 2, W / 2^n - 2)`.

    The network of VQGAN and RQ-VAE with GroupNorm in the place of BatchNorm: an image's logits then depend neither on
    the rest of the batch nor on the number of processes, and batches may be small.

    Args:
        num_layers: convolutions of stride 2, n above. Three see patches of 70 x 70 pixels.
        channels: width of the first layer; each further layer doubles it, up to 8 times.
    """

    def __init__(self, num_layers: int = 3, channels: int = 64):
        super().__init__()
        widths = [channels * min(2**level, 8) for level in range(num_layers + 1)]
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level, (before, width) in enumerate(zip(widths, widths[1:]), start=1):
            stride = 2 if level < num_layers else 1
            layers += [
                nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(32, width), width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.min_size = 3 * 2**num_layers
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
