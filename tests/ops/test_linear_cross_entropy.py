"""Proves the cross-entropy in pieces, and Liger's, against PyTorch's over all logits."""

import importlib.util
import os
import subprocess
import sys
from textwrap import dedent

import pytest
import torch
import torch.nn.functional as F
from transformers.utils import is_liger_kernel_available

from dnd_hf.ops import linear_cross_entropy
from dnd_hf.ops.linear_cross_entropy import summed_cross_entropy


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_cross_entropy_in_pieces_is_that_of_pytorch(precision, trained, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_AT_ONCE", 10 * 50)
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(33, 16, generator=generator), torch.randn(50, 16, generator=generator))
    targets = torch.randint(50, (33,), generator=generator).masked_fill(torch.arange(33) % 4 == 1, -100)
    of_definition = [value.double().requires_grad_(needed) for value, needed in zip(values, trained)]
    expected = F.cross_entropy(of_definition[0] @ of_definition[1].T, targets, reduction="sum")
    expected.backward(torch.tensor(3.0).double())
    ours = [value.clone().requires_grad_(needed) for value, needed in zip(values, trained)]
    tolerance = 1e-5 if precision == torch.float32 else 2e-2
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = summed_cross_entropy(*ours, targets)
        with torch.no_grad():
            assert torch.equal(summed_cross_entropy(*ours, targets), loss)
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
        hidden, weight = torch.randn(70, 64), torch.randn(300, 64) / 8
        targets = torch.randint(300, (70,)).masked_fill(torch.arange(70) % 5 == 0, -100)
        results = []
        for dtype, loss_of in (
            (torch.float64, lambda rows, matrix: F.cross_entropy(rows @ matrix.T, targets, reduction="sum")),
            (torch.float32, lambda rows, matrix: linear_cross_entropy.summed_cross_entropy(rows, matrix, targets)),
        ):
            inputs = [value.to(dtype, copy=True).requires_grad_() for value in (hidden, weight)]
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
