"""Cross-entropy of a linear layer's outputs without ever holding them all: piece by piece, or by Liger's kernel."""

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import is_liger_kernel_available


LOGITS_AT_ONCE = 2**24
"""How many logits are computed at a time: 64 MiB in float32."""


def head_cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Cross-entropy of `head(hidden)`, in nats and summed over the rows, in little memory.

    A plain `nn.Linear` gives its weight to [`summed_cross_entropy`]. Everything else (an adapter, quantized weights,
    hooks) is called as the module that it is, `LOGITS_AT_ONCE` logits at a time; for the gradients each piece
    is then computed again in the backward pass.

    Args:
        head: makes `(rows, vocab_size)` logits of `(rows, hidden_size)`.
        hidden: `(rows, hidden_size)`.
        targets: `(rows,)` integers in `[0, vocab_size)`; -100 leaves a row out.
        vocab_size: logits of a row.

    Returns:
        Scalar, float32.
    """
    if isinstance(head, nn.Linear) and is_plain_linear(head):
        return summed_cross_entropy(hidden, head.weight, targets, head.bias)

    def of_piece(rows: Tensor, goals: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), goals, reduction="sum")

    size = max(1, LOGITS_AT_ONCE // vocab_size)
    pieces = zip(hidden.split(size), targets.split(size))
    return torch.stack([checkpoint(of_piece, *piece, use_reentrant=False) for piece in pieces]).sum()


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling the layer does nothing but multiply by its weight and add its bias, dense tensors."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        type(layer) is nn.Linear
        and type(layer.weight) in (nn.Parameter, Tensor)
        and type(layer.bias) in (nn.Parameter, Tensor, type(None))
        and not any(hooks)
        and "forward" not in vars(layer)  # as accelerate's hooks replace it
    )


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias`, in nats and summed over the rows, in little memory.

    On CUDA, where Liger is installed, its fused kernel; elsewhere [`LinearCrossEntropy`].

    Args:
        hidden: `(rows, hidden_size)`.
        weight: `(vocab_size, hidden_size)`.
        targets: `(rows,)` integers in `[0, vocab_size)`; -100 leaves a row out.
        bias: `(vocab_size,)` or None.

    Returns:
        Scalar, float32.
    """
    if _liger_runs(hidden):
        liger = import_module("liger_kernel.transformers")  # no statement, which remote code would have to have
        return liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets, bias)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return LinearCrossEntropy.apply(hidden, weight, bias, targets)


def _liger_runs(hidden: Tensor) -> bool:
    return hidden.is_cuda and is_liger_kernel_available()


class LinearCrossEntropy(torch.autograd.Function):
    """[`summed_cross_entropy`] in pieces, so that at most `LOGITS_AT_ONCE` logits exist at a time.

    The gradients are made from the logits as soon as these are there, as in Liger's kernel (arXiv 2410.10989, Section
    3.2), so nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        of_hidden, of_weight, of_bias = [], None, None
        total = hidden.new_zeros((), dtype=torch.float32)
        size = max(1, LOGITS_AT_ONCE // len(weight))
        for rows, goals in zip(hidden.split(size), targets.split(size)):
            log_probs = F.linear(rows, weight, bias).float().log_softmax(-1)
            total += F.nll_loss(log_probs, goals, reduction="sum")
            if not any(ctx.needs_input_grad):
                continue
            counted = (goals != -100).to(rows.dtype)[:, None]
            goals = goals.clamp(min=0)[:, None]
            errors = log_probs.exp_().scatter_add_(1, goals, log_probs.new_full(goals.shape, -1)).to(rows.dtype)
            if ctx.needs_input_grad[0]:
                of_hidden.append(errors @ weight * counted)
            if ctx.needs_input_grad[1]:
                of_piece = errors.T @ (rows * counted)
                of_weight = of_piece if of_weight is None else of_weight.float().add_(of_piece)
            if ctx.needs_input_grad[2]:
                of_piece = (errors * counted).sum(0, dtype=torch.float32)
                of_bias = of_piece if of_bias is None else of_bias + of_piece
        ctx.save_for_backward(torch.cat(of_hidden) if of_hidden else None, of_weight, of_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if gradient is None else gradient * scale for gradient in ctx.saved_tensors), None
