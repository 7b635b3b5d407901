"""dnd_hf.training.losses and discriminator, from their definitions."""

import pytest
import torch

from dnd_hf.training.discriminator import PatchDiscriminator
from dnd_hf.training.losses import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss


def test_hinge_losses_of_hand_cases():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)
    assert hinge_generator_loss(fake).item() == pytest.approx(1 / 3)


def test_the_discriminators_loss_ignores_logits_beyond_the_margin():
    real, fake = torch.tensor([1.5], requires_grad=True), torch.tensor([-1.5], requires_grad=True)
    hinge_discriminator_loss(real, fake).backward()
    assert real.grad == 0 and fake.grad == 0


def test_the_adaptive_weight_is_the_ratio_of_the_gradient_norms_at_the_last_layer():
    layer = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    reconstruction_loss, generator_loss = (3 * layer).sum(), layer.square().sum()
    by_hand = (4 * 3.0**2) ** 0.5 / ((4 * (1 + 4 + 9 + 16)) ** 0.5 + 1e-4)
    weight = adaptive_weight(reconstruction_loss, generator_loss, layer)
    assert weight.item() == pytest.approx(by_hand) and not weight.requires_grad
    (reconstruction_loss + weight * generator_loss).backward()
    assert torch.allclose(layer.grad, 3 + by_hand * 2 * layer.detach())


def test_the_adaptive_weight_is_bounded_where_the_gan_has_no_gradient():
    layer = torch.ones(2, requires_grad=True)
    assert adaptive_weight((100 * layer).sum(), (0 * layer).sum(), layer) == 1e4


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_discriminator_gives_one_logit_a_patch(num_layers):
    discriminator = PatchDiscriminator(num_layers, channels=8)
    logits = discriminator(torch.zeros(2, 3, 32, 64))
    assert logits.shape == (2, 1, 32 // 2**num_layers - 2, 64 // 2**num_layers - 2)
    assert discriminator(torch.zeros(1, 3, *[discriminator.min_size] * 2)).shape == (1, 1, 1, 1)


def test_the_discriminator_sees_patches_of_70_pixels():
    discriminator = PatchDiscriminator(3, channels=8)
    for layer in discriminator.layers:
        if isinstance(layer, torch.nn.GroupNorm):  # its statistics are those of the whole picture
            layer.forward = lambda x: x
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    discriminator(images)[0, 0, 7, 7].backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 70


def test_a_pictures_logits_do_not_depend_on_the_batch():
    discriminator, images = PatchDiscriminator(2, channels=8), torch.randn(3, 3, 16, 16)
    assert torch.allclose(discriminator(images)[:1], discriminator(images[:1]), atol=1e-6)


def test_the_discriminator_starts_from_weights_of_deviation_002():
    weights = torch.cat([p.flatten() for p in PatchDiscriminator().parameters() if p.ndim == 4])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
