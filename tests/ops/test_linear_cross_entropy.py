"""Proves the cross-entropy in pieces, and Liger's, against PyTorch's over all logits."""

import importlib.util
import os
import subprocess
import sys
from textwrap import dedent

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import is_liger_kernel_available

from dnd_hf.ops import linear_cross_entropy
from dnd_hf.ops.linear_cross_entropy import head_cross_entropy, is_plain_linear, summed_cross_entropy


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, True), (False, True, False)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_cross_entropy_in_pieces_is_that_of_pytorch(precision, trained, biased, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_AT_ONCE", 10 * 50)
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 16), (50, 16), (50,)][: 2 + biased]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    targets = torch.randint(50, (33,), generator=generator).masked_fill(torch.arange(33) % 4 == 1, -100)
    of_definition = [value.double().requires_grad_(needed) for value, needed in zip(values, trained)]
    expected = F.cross_entropy(F.linear(*of_definition), targets, reduction="sum")
    expected.backward(torch.tensor(3.0).double())
    ours = [value.clone().requires_grad_(needed) for value, needed in zip(values, trained)]
    tolerance = 1e-5 if precision == torch.float32 else 2e-2
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = summed_cross_entropy(*ours[:2], targets, *ours[2:])
        with torch.no_grad():
            assert torch.equal(summed_cross_entropy(*ours[:2], targets, *ours[2:]), loss)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for times in (1, 2):  # the graph can be used again
        loss.backward(torch.tensor(3.0), retain_graph=True)
        for one, other, needed in zip(ours, of_definition, trained):
            assert (one.grad is not None) == needed
            if needed:
                assert (one.grad - times * other.grad).abs().max() <= tolerance * times * other.grad.abs().max()


@pytest.mark.skipif(
    not (is_liger_kernel_available() and importlib.util.find_spec("triton")), reason="needs liger-kernel and triton"
)
def test_the_cross_entropy_of_liger_is_that_of_pytorch():
    """In a process whose Triton interprets the kernel, on the CPU."""
    program = """
        import torch
        import torch.nn.functional as F
        from dnd_hf.ops import linear_cross_entropy

        linear_cross_entropy._liger_runs = lambda hidden: True
        torch.manual_seed(0)
        values = torch.randn(70, 64), torch.randn(300, 64) / 8, torch.randn(300)
        targets = torch.randint(300, (70,)).masked_fill(torch.arange(70) % 5 == 0, -100)
        results = []
        for dtype, loss_of in (
            (torch.float64, lambda *inputs: F.cross_entropy(F.linear(*inputs), targets, reduction="sum")),
            (torch.float32, lambda *inputs: linear_cross_entropy.summed_cross_entropy(*inputs[:2], targets, inputs[2])),
        ):
            inputs = [value.to(dtype, copy=True).requires_grad_() for value in values]
            loss = loss_of(*inputs)
            loss.backward()
            results.append((loss.detach(), *(value.grad for value in inputs)))
        for exact, fused in zip(*results):
            assert (fused - exact).abs().max() <= 1e-5 * exact.abs().max(), (fused, exact)
        print(type(loss.grad_fn).__name__)
    """
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", dedent(program)], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "LigerFusedLinearCrossEntropyFunctionBackward"


def test_a_loss_that_no_code_counts_in_is_zero():
    hidden = torch.randn(4, 16, requires_grad=True)
    loss = summed_cross_entropy(hidden, torch.randn(50, 16), torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


class Scaled(nn.Linear):
    def forward(self, rows):
        return 2 * super().forward(rows)


class TaggedWeight(torch.Tensor):
    """A tensor subclass, as quantized weights are."""


def odd_heads() -> dict[str, nn.Module]:
    """Heads of 16 inputs and 50 outputs that are more than a product with their `weight`."""
    heads = {name: nn.Linear(16, 50, bias=False) for name in ("hook", "pre-hook", "parametrized", "replaced", "tagged")}
    heads["hook"].register_forward_hook(lambda module, args, logits: logits + logits.cos())
    heads["pre-hook"].register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    nn.utils.parametrizations.weight_norm(heads["parametrized"])
    plain = heads["replaced"].forward
    heads["replaced"].forward = lambda rows: plain(rows.sin())
    heads["tagged"].weight = nn.Parameter(heads["tagged"].weight.detach().as_subclass(TaggedWeight))
    heads["subclass"] = Scaled(16, 50, bias=False)
    heads["two layers"] = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 50, bias=False))
    return heads


@pytest.mark.parametrize("name", odd_heads())
def test_a_head_that_is_no_plain_layer_is_called_in_pieces_and_learns(name, largest_tensor, monkeypatch):
    torch.manual_seed(0)
    head, hidden = odd_heads()[name], torch.randn(33, 16, requires_grad=True)
    targets = torch.randint(50, (33,)).masked_fill(torch.arange(33) % 4 == 1, -100)
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_AT_ONCE", 10 * 50)
    with largest_tensor() as largest:
        loss = head_cross_entropy(head, hidden, targets, 50)
        loss.backward()
    assert largest.numel <= 16 * 50 < 33 * 50  # a weight at most, never all logits
    trained = [hidden, *head.parameters()]
    gradients = [tensor.grad.clone() for tensor in trained]
    for tensor in trained:
        tensor.grad = None
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for gradient, tensor in zip(gradients, trained, strict=True):
        torch.testing.assert_close(gradient, tensor.grad, rtol=1e-5, atol=1e-6)
    assert all(gradient.any() for gradient in gradients)


def test_a_plain_layer_is_never_called(monkeypatch):
    head = nn.Linear(16, 50, bias=False)
    assert is_plain_linear(head) and not any(is_plain_linear(odd) for odd in odd_heads().values())
    targets, hidden = torch.arange(5), torch.randn(5, 16)
    assert torch.equal(
        head_cross_entropy(head, hidden, targets, 50), summed_cross_entropy(hidden, head.weight, targets)
    )
