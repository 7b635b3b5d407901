"""Decoding on CPUs in few operations, with copies of the weights in oneDNN's own layout.

A product of few rows takes as long as its weight takes to read, which is fastest in that layout (`torch.compile` packs
frozen weights likewise). docs/benchmarks.md says what each step brought, and what did not help.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.packed_linear import PackedLinear, can_pack
from .decoders import ModelRunner, causal_mask, head_of_each_depth
from .interface import ImageCodeModel, Layer, LayerStack


POSITIONS_AT_ONCE = 32
"""By how many positions the cache of a `PackedDecoder` grows."""


def can_run_packed(model: ImageCodeModel) -> bool:
    """Whether all layers and heads are as they were built, on a CPU, and in a precision for which oneDNN is there."""
    if not all(can_pack(weight) for weight in model.parameters()):
        return False
    layers = [layer for stack in model.layer_stacks(model.device) for layer in stack.layers]
    return all(map(_is_plain_linear, model.heads)) and all(map(_is_plain_block, layers))


def packed_runner(model: ImageCodeModel, rows: int, count: int = 1) -> ModelRunner:
    """A model whose weights do not change while the runner is in use.

    For passes that choose the codes of up to `count` cells of each of `rows` sequences.
    """
    first, *others = model.layer_stacks(model.device)
    decoders = [PackedDecoder(first, rows), *(PackedDecoder(stack, rows * count) for stack in others)]
    packed = [joined([cast(nn.Linear, head)], rows) for head in model.heads]
    heads = head_of_each_depth(packed, model.config.code_depth)
    return ModelRunner(decoders, heads, packed_context if torch.is_autocast_enabled("cpu") else torch.inference_mode)


@contextmanager
def packed_context() -> Iterator[None]:
    """In which packed steps run: nobody else has the tensors that they make, and the weights decide the precision."""
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        yield


class PackedDecoder:
    """A [`Decoder`] over a contiguous cache, since a product would copy it first otherwise.

    The cache grows by `POSITIONS_AT_ONCE`, and a mask hides what is not filled.
    """

    def __init__(self, stack: LayerStack, rows: int):
        self.layers = [PackedLayer(layer, rows) for layer in stack.layers]
        keys = self.layers[0].attention.keys
        self.masks, self.room = causal_mask(stack.length, keys.device, keys.dtype), 0
        self.rotary: tuple[Tensor, Tensor] | None = None
        if stack.rotary is not None:
            cos, sin = (table[0, :, None] for table in stack.rotary)
            left, right = sin.chunk(2, -1)
            self.rotary = cos, torch.cat([-left, right], dim=-1)  # so that turning takes no negation

    def at(self, position: int, count: int = 1) -> list[Layer]:
        end = position + count
        while self.room < end:
            grown = min(POSITIONS_AT_ONCE, len(self.masks) - self.room)
            for layer in self.layers:
                layer.attention.grow(grown)
            self.room += grown
        options: dict[str, Any] = dict(position=position, rotary=None, mask=self.masks[position:end, : self.room])
        if self.rotary is not None:
            options["rotary"] = tuple(table[position:end] for table in self.rotary)
        return [partial(layer, **options) for layer in self.layers]

    def reorder(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.attention.reorder(rows)


class PackedLayer:
    """A pre-norm transformer block for few tokens of each of up to `rows` sequences."""

    def __init__(self, layer: Any, rows: int):
        self.attention_norm, self.mlp_norm = (
            packed_norm(layer.input_layernorm),
            packed_norm(layer.post_attention_layernorm),
        )
        self.attention = PackedAttention(layer.self_attn, rows)
        self.mlp = GatedMLP(layer.mlp, rows) if hasattr(layer.mlp, "gate_proj") else PlainMLP(layer.mlp, rows)

    def __call__(self, hidden_RTC: Tensor, position: int, rotary: tuple[Tensor, Tensor] | None, mask: Tensor) -> Tensor:
        hidden_RTC = hidden_RTC + self.attention(self.attention_norm(hidden_RTC), position, rotary, mask)
        return hidden_RTC + self.mlp(self.mlp_norm(hidden_RTC))

    @property
    def products(self) -> list[PackedLinear]:
        """All matrix products with weights, in order."""
        return [*self.attention.products, *self.mlp.products]


class PackedAttention:
    """Self-attention as one product for queries, keys and values, and two over the cache.

    PyTorch's fused kernel is made for many queries; for one in bfloat16 it takes several times as long.
    """

    def __init__(self, attention: Any, rows: int):
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.qkv_proj = joined([attention.q_proj, attention.k_proj, attention.v_proj], rows)
        self.o_proj = joined([attention.o_proj], rows)
        self.products = [self.qkv_proj, self.o_proj]
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.keys = self.values = attention.k_proj.weight.new_empty(rows * self.kv_heads, 0, self.head_dim)

    def grow(self, positions: int) -> None:
        """Makes room for so many more positions in the cache."""
        room = self.keys.new_zeros(len(self.keys), positions, self.head_dim)
        self.keys, self.values = (torch.cat([filled, room], dim=1) for filled in (self.keys, self.values))

    def reorder(self, rows: Tensor) -> None:
        """Row i takes over the keys and values of row `rows[i]`."""
        self.keys, self.values = (
            kept.unflatten(0, (-1, self.kv_heads))[rows].flatten(0, 1) for kept in (self.keys, self.values)
        )

    def __call__(self, hidden_RTC: Tensor, position: int, rotary: tuple[Tensor, Tensor] | None, mask: Tensor) -> Tensor:
        """`(rows, T, hidden_size)` of the tokens from `position` on; cosines and sines `(T, 1, head_dim)`, mask
        `(T, positions with room)`."""
        rows, count, _ = hidden_RTC.shape
        sequences = rows * self.kv_heads
        keys, values = self.keys, self.values
        if sequences < len(keys):
            keys, values = keys[:sequences], values[:sequences]
        qkv = self.qkv_proj(hidden_RTC).view(rows, count, -1, self.head_dim)
        heads = qkv.shape[2] - 2 * self.kv_heads
        turned, value = qkv.split((heads + self.kv_heads, self.kv_heads), 2)
        if rotary is not None:
            cos, sin = rotary
            turned = torch.addcmul(turned * cos, turned.roll(self.head_dim // 2, -1), sin)
        query, key = turned.split((heads, self.kv_heads), 2)
        query = query * self.scaling
        if count > 1:  # sequences, then tokens; of heads that share keys, the tokens are the rows of one product
            key, value = key.transpose(1, 2), value.transpose(1, 2)
            query = query.unflatten(2, (self.kv_heads, -1)).permute(0, 2, 3, 1, 4)
        keys.narrow(1, position, count).copy_(key.reshape(sequences, count, self.head_dim))
        values.narrow(1, position, count).copy_(value.reshape(sequences, count, self.head_dim))
        scores = query.reshape(sequences, -1, self.head_dim) @ keys.mT
        if count > 1:
            scores.unflatten(1, (-1, count)).add_(mask)
        else:
            scores.add_(mask)
        attended = scores.softmax(-1) @ values
        if count > 1:
            attended = attended.view(rows, -1, count, self.head_dim).transpose(1, 2)
        attended = attended.reshape(rows, count, -1)
        return self.o_proj(attended)


class GatedMLP:
    """`down(act(gate(x)) * up(x))`, with gate and up as one product."""

    def __init__(self, mlp: Any, rows: int):
        self.act_fn = mlp.act_fn
        self.gate_up_proj, self.down_proj = joined([mlp.gate_proj, mlp.up_proj], rows), joined([mlp.down_proj], rows)
        self.products = [self.gate_up_proj, self.down_proj]

    def __call__(self, hidden_RTC: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_RTC).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


class PlainMLP:
    """`down(act(up(x)))`."""

    def __init__(self, mlp: Any, rows: int):
        self.act_fn = mlp.act_fn
        self.up_proj, self.down_proj = joined([mlp.up_proj], rows), joined([mlp.down_proj], rows)
        self.products = [self.up_proj, self.down_proj]

    def __call__(self, hidden_RTC: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_RTC)))


def joined(layers: list[nn.Linear], rows: int) -> PackedLinear:
    """Linear layers of the same input as one product, whose outputs stand side by side."""
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return PackedLinear(torch.cat([layer.weight for layer in layers]), bias, rows)


def packed_norm(norm: Any) -> Callable[[Tensor], Tensor]:
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


def _is_plain_block(layer: nn.Module) -> bool:
    """Whether a layer consists of what [`PackedLayer`] reads, and nobody has hooked or replaced a part of it."""
    attention: Any = getattr(layer, "self_attn", None)
    mlp: Any = getattr(layer, "mlp", None)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    linear: list[Any] = [getattr(attention, name, None) for name in names] + [getattr(mlp, "up_proj", None)]
    linear += [getattr(mlp, "down_proj", None)] + ([mlp.gate_proj] if hasattr(mlp, "gate_proj") else [])
    norms: list[Any] = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    if not all(type(part) is nn.Linear for part in linear):
        return False
    if not all(type(norm) in (nn.RMSNorm, nn.LayerNorm) and norm.weight is not None for norm in norms):
        return False
    known = {weight for part in (*linear, *norms) for weight in part.parameters()}
    return known == set(layer.parameters()) and not any(_is_changed(part) for part in layer.modules())


def _is_plain_linear(head: nn.Module) -> bool:
    return type(head) is nn.Linear and not _is_changed(head)


def _is_changed(module: nn.Module) -> bool:
    """Whether it has hooks, or a `forward` of its own as the offloading of Accelerate gives it.

    The hooks by which transformers captures hidden states and attentions do nothing here.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    capturing = "transformers.utils.output_capturing"
    return "forward" in vars(module) or any(getattr(hook, "__module__", None) != capturing for hook in hooks)
