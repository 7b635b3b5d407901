"""Transformer blocks on CPUs in few operations: what a block computes from its packed products, and its cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.packed_linear import PackedLinear
from .interface import LayerStack


class KeysValues:
    """Keys and values of one layer, `(rows * heads, positions, head_dim)`, without gaps, for products over them."""

    def __init__(self, sequences: int, heads: int, head_dim: int, dtype: torch.dtype):
        self.heads = heads
        self.keys = self.values = torch.empty(sequences * heads, 0, head_dim, dtype=dtype)

    def grow(self, positions: int) -> None:
        """Makes room for so many more positions."""
        room = self.keys.new_zeros(len(self.keys), positions, self.keys.shape[2])
        self.keys, self.values = (torch.cat([filled, room], dim=1) for filled in (self.keys, self.values))

    def reorder(self, rows: Tensor) -> None:
        """Row i takes over the keys and values of row `rows[i]`."""
        self.keys, self.values = (
            kept.unflatten(0, (-1, self.heads))[rows].flatten(0, 1) for kept in (self.keys, self.values)
        )

    def places(self, positions_RT: Tensor) -> Tensor:
        """Where the keys of tokens at these positions are among all, `(rows * T * heads,)`."""
        first_RH = torch.arange(len(positions_RT) * self.heads).view(-1, 1, self.heads) * self.keys.shape[1]
        return (first_RH + positions_RT[:, :, None]).flatten()

    def update(self, places: int | Tensor, key_RTHE: Tensor, value_RTHE: Tensor) -> tuple[Tensor, Tensor]:
        """Writes those of T tokens, `(rows, T, heads, head_dim)`; returns all of these rows, which may be fewer.

        Args:
            places: the first position, or what `places` makes of all where they are not the same in all rows.
        """
        sequences, count = len(key_RTHE) * self.heads, key_RTHE.shape[1]
        keys, values = self.keys[:sequences], self.values[:sequences]
        for kept, new in ((keys, key_RTHE), (values, value_RTHE)):
            if isinstance(places, Tensor):
                kept.flatten(0, 1).index_copy_(0, places, new.flatten(0, 2))
                continue
            if count > 1:
                new = new.transpose(1, 2)
            kept.narrow(1, places, count).copy_(new.reshape(sequences, count, -1))
        return keys, values


class PackedLayer:
    """A pre-norm transformer block for few tokens of each sequence.

    Args:
        layer: the block, see [`LayerStack`].
        products: those of [`groups_of_layer`].
    """

    def __init__(self, layer: Any, products: list[PackedLinear]):
        self.products = products
        qkv_proj, o_proj, first, down_proj = products
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.attention_norm, self.mlp_norm = map(packed_norm, self.norms)
        self.attention = PackedAttention(layer.self_attn, qkv_proj, o_proj)
        make_mlp = GatedMLP if hasattr(layer.mlp, "gate_proj") else PlainMLP
        self.mlp = make_mlp(layer.mlp.act_fn, first, down_proj)

    def __call__(
        self,
        hidden_RTC: Tensor,
        cache: KeysValues,
        places: int | Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor,
    ) -> Tensor:
        hidden_RTC = hidden_RTC + self.attention(self.attention_norm(hidden_RTC), cache, places, rotary, mask)
        return hidden_RTC + self.mlp(self.mlp_norm(hidden_RTC))


class PackedAttention:
    """Self-attention as one product for queries, keys and values, and two over the cache.

    PyTorch's fused kernel is made for many queries; for one in bfloat16 it takes several times as long.
    """

    def __init__(self, attention: Any, qkv_proj: PackedLinear, o_proj: PackedLinear):
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        self.kv_heads = attention.k_proj.out_features // self.head_dim

    def __call__(
        self,
        hidden_RTC: Tensor,
        cache: KeysValues,
        places: int | Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor,
    ) -> Tensor:
        """`(rows, T, hidden_size)` of tokens whose keys come to `places` ([`KeysValues.update`]); cosines and sines
        `(T, 1, head_dim)` or `(rows, T, 1, head_dim)`, mask `(T, positions with room)` or `(rows, 1, T, ...)`."""
        rows, count, _ = hidden_RTC.shape
        qkv = self.qkv_proj(hidden_RTC).view(rows, count, -1, self.head_dim)
        heads = qkv.shape[2] - 2 * self.kv_heads
        turned, value = qkv.split((heads + self.kv_heads, self.kv_heads), 2)
        if rotary is not None:
            cos, sin = rotary
            turned = torch.addcmul(turned * cos, turned.roll(self.head_dim // 2, -1), sin)
        query, key = turned.split((heads, self.kv_heads), 2)
        keys, values = cache.update(places, key, value)
        query = query * self.scaling
        if count > 1:  # of heads that share keys, the tokens are the rows of one product
            query = query.unflatten(2, (self.kv_heads, -1)).permute(0, 2, 3, 1, 4)
        scores = query.reshape(len(keys), -1, self.head_dim) @ keys.mT
        if count > 1 or isinstance(places, Tensor):
            scores.view(rows, -1, count, scores.shape[-1]).add_(mask)
        else:
            scores.add_(mask)
        attended = scores.softmax(-1) @ values
        if count > 1:
            attended = attended.view(rows, -1, count, self.head_dim).transpose(1, 2)
        return self.o_proj(attended.reshape(rows, count, -1))


class GatedMLP:
    """`down(act(gate(x)) * up(x))`, with gate and up as one product."""

    def __init__(self, act_fn: Callable[[Tensor], Tensor], gate_up_proj: PackedLinear, down_proj: PackedLinear):
        self.act_fn, self.gate_up_proj, self.down_proj = act_fn, gate_up_proj, down_proj

    def __call__(self, hidden_RTC: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_RTC).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


class PlainMLP:
    """`down(act(up(x)))`."""

    def __init__(self, act_fn: Callable[[Tensor], Tensor], up_proj: PackedLinear, down_proj: PackedLinear):
        self.act_fn, self.up_proj, self.down_proj = act_fn, up_proj, down_proj

    def __call__(self, hidden_RTC: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_RTC)))


def signed_rotary(stack: LayerStack) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of a stack, `(length, 1, head_dim)`; the first half of the sines is negated for turning."""
    if stack.rotary is None:
        return None
    cos, sin = (table[0, :, None] for table in stack.rotary)
    left, right = sin.chunk(2, -1)
    return cos, torch.cat([-left, right], dim=-1)


def packed_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """The norm of a block, RMS norm or layer norm."""
    if type(norm) is nn.RMSNorm:
        return FusedRMSNorm(norm)
    return partial(
        F.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias, eps=norm.eps
    )


class FusedRMSNorm:
    """RMS norm by the kernel that CPUs have for layer norm: over [x, -x], whose mean is zero, the two are the same."""

    def __init__(self, norm: Any):
        self.weight, self.eps = norm.weight.repeat(2), norm.eps

    def __call__(self, hidden_states: Tensor) -> Tensor:
        both = torch.cat([hidden_states, -hidden_states], dim=-1)
        return F.layer_norm(both, self.weight.shape, self.weight, None, self.eps)[..., : hidden_states.shape[-1]]
