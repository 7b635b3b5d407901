"""Soft targets against their definition, written out in float64."""

import pytest
import torch
from torch import nn

from dnd_hf.ops import soft_targets as module
from dnd_hf.ops.soft_targets import SoftTargets, soft_code_probabilities


def by_definition(residuals, codebook, temperature):
    distances = torch.tensor([[(r - c).square().sum() for c in codebook.double()] for r in residuals.double()])
    weights = (-distances / temperature).exp()
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
def test_probabilities_fall_with_the_squared_distance(temperature):
    torch.manual_seed(0)
    residuals, codebook = torch.randn(7, 4), torch.randn(9, 4)
    expected = by_definition(residuals, codebook, temperature).float()
    torch.testing.assert_close(soft_code_probabilities(residuals, codebook, temperature), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(soft_code_probabilities(residuals, codebook, temperature), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_the_loss_and_its_gradients_are_those_of_the_whole_distribution(shared, bias, monkeypatch):
    torch.manual_seed(0)
    batch, height, width, depth, dim, vocab_size = 2, 2, 3, 2, 4, 9
    residuals, codebooks = torch.randn(batch, height, width, depth, dim), torch.randn(1 if shared else depth, 9, dim)
    targets = SoftTargets(residuals, codebooks, 0.7)
    head = nn.Linear(5, vocab_size, bias=bias)
    hidden = torch.randn(batch * height * width, 5, requires_grad=True)
    sizes = []
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 45)  # five rows at a time
    head.register_forward_hook(lambda *call: sizes.append(call[-1].numel()))
    for k in range(depth):
        rows = residuals[..., k, :].reshape(-1, dim)
        expected_targets = by_definition(rows, codebooks[0 if shared else k], 0.7)
        expected = -(expected_targets * head(hidden).double().log_softmax(-1)).sum()
        sizes.clear()
        loss = targets.summed_cross_entropy(head, hidden, k)
        torch.testing.assert_close(loss, expected.float())
        wanted = [hidden, *head.parameters()]
        gradients = torch.autograd.grad(loss, wanted)
        for gradient, one in zip(gradients, torch.autograd.grad(expected, wanted)):
            torch.testing.assert_close(gradient, one, rtol=1e-4, atol=1e-5)
        assert max(sizes) <= 45


@pytest.mark.parametrize("architecture", ["make_model", "make_rq_model"])
def test_both_architectures_take_soft_targets_in_place_of_labels(architecture, request):
    torch.manual_seed(0)
    model = request.getfixturevalue(architecture)(code_depth=2)
    labels = torch.tensor([0, 3])
    codes = torch.randint(11, (2, 2, 3, 2))
    targets = SoftTargets(torch.randn(2, 2, 3, 2, 4), torch.randn(2, 11, 4), 0.5)
    output = model(labels, codes, soft_targets=targets)
    log_probs = output.logits.double().log_softmax(-1).view(2, 2, 3, 2, 11)
    losses = []
    for k in range(2):
        rows = by_definition(targets.residuals[..., k, :].reshape(-1, 4), targets.codebooks[k], 0.5)
        losses.append(-(rows * log_probs[..., k, :].reshape(-1, 11)).sum(-1).mean())
    losses = torch.stack(losses).float()
    torch.testing.assert_close(output.depth_losses, losses)
    torch.testing.assert_close(output.loss, losses.mean())
    piecewise = model(labels, codes, soft_targets=targets, output_logits=False)
    torch.testing.assert_close(piecewise.loss, output.loss)
    assert piecewise.logits is None

    with pytest.raises(ValueError, match="`labels` must be None with `soft_targets`"):
        model(labels, codes, labels=codes, soft_targets=targets)
    for wrong in (
        SoftTargets(targets.residuals[:, :1], targets.codebooks, 0.5),
        SoftTargets(targets.residuals, targets.codebooks[:, :10], 0.5),
        SoftTargets(targets.residuals, targets.codebooks[..., :3], 0.5),
    ):
        with pytest.raises(ValueError, match="`soft_targets` must have residuals"):
            model(labels, codes, soft_targets=wrong)


def test_near_zero_temperature_the_targets_are_the_nearest_codes(make_rq_model):
    torch.manual_seed(0)
    model = make_rq_model(code_depth=2)
    residuals, codebooks = torch.randn(2, 2, 3, 2, 4), torch.randn(1, 11, 4)
    nearest = torch.cdist(residuals.flatten(0, 3), codebooks[0]).argmin(-1).view(2, 2, 3, 2)
    labels = torch.tensor([0, 3])
    soft = model(labels, nearest, soft_targets=SoftTargets(residuals, codebooks, 1e-4)).loss
    torch.testing.assert_close(soft, model(labels, nearest, labels=nearest).loss)


def test_a_compiled_model_computes_the_same_loss(make_rq_model):
    torch.manual_seed(0)
    model = make_rq_model(code_depth=2)
    labels, codes = torch.tensor([0, 3]), torch.randint(11, (2, 2, 3, 2))
    targets = SoftTargets(torch.randn(2, 2, 3, 2, 4), torch.randn(2, 11, 4), 0.5)
    expected = model(labels, codes, soft_targets=targets, output_logits=False).loss
    model.compile(backend="eager")
    loss = model(labels, codes, soft_targets=targets, output_logits=False).loss
    torch.testing.assert_close(loss, expected)
