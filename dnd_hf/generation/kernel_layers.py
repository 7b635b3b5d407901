"""Packed blocks in compiled C++ (`model.cpu_kernels = True`)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..ops.packed_linear import PackedLinear
from .interface import Layer, LayerStack, Position
from .packed_layers import GatedMLP, PackedLayer, signed_rotary


SILU = (nn.SiLU, type(ACT2FN["silu"]))
"""The modules that compute it."""


class KernelDecoder:
    """A [`Decoder`] of such blocks, with room for all positions from the start: what is not filled is never read.

    Args:
        kernels: what [`decoding_kernels`] gives.
    """

    def __init__(self, stack: LayerStack, layers: list[PackedLayer], rows: int, dtype: torch.dtype, kernels: Any):
        self.layers = [KernelLayer(layer, kernels) for layer in layers]
        self.caches = [KernelKeysValues(stack, rows, dtype, kernels.vector_width()) for _ in layers]
        rotary = signed_rotary(stack)
        self.rotary = (None, None) if rotary is None else rotary

    def at(self, position: Position, count: int = 1) -> list[Layer]:
        positions = torch.tensor([position] if isinstance(position, int) else position)
        options: dict[str, Any] = dict(positions=positions, rotary=self.rotary)
        return [partial(layer, cache=cache, **options) for layer, cache in zip(self.layers, self.caches)]

    def reorder(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.keys, cache.values = cache.keys[rows], cache.values[rows]


class KernelKeysValues:
    """Keys `(rows, heads, blocks, head_dim, W)` of W positions a block, so that W scores are one vector of the CPU, and
    values `(rows, heads, positions, head_dim)`."""

    def __init__(self, stack: LayerStack, rows: int, dtype: torch.dtype, width: int):
        blocks, dim = -(-stack.length // width), stack.head_dim
        self.keys = torch.empty(rows, stack.num_key_value_heads, blocks, dim, width, dtype=dtype)
        self.values = torch.empty(rows, stack.num_key_value_heads, blocks * width, dim, dtype=dtype)


class KernelLayer:
    """What a [`PackedLayer`] computes, in two calls where its gate is silu."""

    def __init__(self, layer: PackedLayer, kernels: Any):
        self.layer, self.kernels = layer, kernels
        self.attention_norm, self.mlp_norm = map(norm_arguments, layer.norms)
        self.qkv_proj, self.o_proj, self.first, self.down_proj = (
            (product.weight, product.bias) for product in layer.products
        )
        self.gated_by_silu = isinstance(layer.mlp, GatedMLP) and isinstance(layer.mlp.act_fn, SILU)

    @property
    def products(self) -> list[PackedLinear]:
        """All matrix products with weights, in order."""
        return self.layer.products

    def __call__(
        self,
        hidden_RTC: Tensor,
        cache: KernelKeysValues,
        positions: Tensor,
        rotary: tuple[Tensor, Tensor] | tuple[None, None],
    ) -> Tensor:
        """Of tokens from `positions` on, `(rows,)` or one for all; cosines and sines `(length, 1, head_dim)`."""
        hidden_RTC, scaling = hidden_RTC.contiguous(), self.layer.attention.scaling
        where = *rotary, cache.keys, cache.values, positions, scaling
        branch_RTC = self.kernels.attention_branch(
            hidden_RTC, *self.attention_norm, *self.qkv_proj, *self.o_proj, *where
        )
        if self.gated_by_silu:
            return self.kernels.add_gated_mlp(hidden_RTC, branch_RTC, *self.mlp_norm, *self.first, *self.down_proj)
        hidden_RTC, normed_RTC = self.kernels.add_norm(hidden_RTC, branch_RTC, *self.mlp_norm)
        return hidden_RTC + self.layer.mlp(normed_RTC)


def norm_arguments(norm: Any) -> tuple[Tensor, Tensor | None, float]:
    """Weight, bias and epsilon of an RMS norm, which has no bias, or a layer norm, which has one."""
    if type(norm) is nn.RMSNorm:
        return norm.weight, None, torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps
    return norm.weight, torch.zeros_like(norm.weight) if norm.bias is None else norm.bias, norm.eps
