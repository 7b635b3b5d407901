"""LPIPS: what it computes, and what it says where its package or its weights are missing."""

import importlib.util
import sys
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch

from dnd_hf.ops.perceptual_loss import PerceptualLoss


@pytest.mark.skipif(importlib.util.find_spec("lpips") is not None, reason="lpips is installed")
def test_without_lpips_the_error_says_what_to_install():
    with pytest.raises(ImportError, match=r"pip install .*lpips"):
        PerceptualLoss()


def test_without_its_weights_or_a_network_the_error_says_where_to_put_them(monkeypatch):
    def download(**_):
        raise URLError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=download))
    with pytest.raises(OSError, match=r"vgg16-397923af\.pth into .*checkpoints.*do without this loss.*no route"):
        PerceptualLoss()


def test_the_perceptual_loss_is_the_mean_distance_in_float32_and_does_not_train(monkeypatch):
    class Network(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, images, targets):
            assert images.dtype == targets.dtype == torch.float32
            return self.scale * (images - targets).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Network))
    loss = PerceptualLoss()
    images = torch.rand(3, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        distance = loss(images, torch.zeros(3, 3, 8, 8))
    assert distance.item() == pytest.approx(2 * images.float().square().mean().item(), rel=1e-6)
    distance.backward()
    assert images.grad.abs().sum() > 0 and all(parameter.grad is None for parameter in loss.parameters())
