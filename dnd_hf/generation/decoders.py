"""How generate() runs the layers for one new token a sequence: as they are, static for CUDA graphs, packed for CPUs."""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.packed_linear import PackedLinear, can_pack


POSITIONS_AT_ONCE = 32
"""By how many positions the cache of a `PackedDecoder` grows."""

POSITIONS_IN_GRAPH = 64
"""How many positions of a `StaticDecoder` read the same part of the cache, and so share a CUDA graph."""


class KeyValueCache:
    """Keys and values of one layer, to which its attention adds one token at a time with `update`.

    The layer gets views of what is filled, so nothing is copied and no mask is needed.

    Args:
        keys, values: memory for them, `(batch, heads, positions, head_dim)`.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.position = keys, values, 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Writes a `(batch, heads, 1, head_dim)` key and value at `position`; returns all up to there."""
        self.keys.narrow(2, self.position, 1).copy_(key)
        self.values.narrow(2, self.position, 1).copy_(value)
        return self.keys.narrow(2, 0, self.position + 1), self.values.narrow(2, 0, self.position + 1)


class Decoder:
    """The layers of a model as they are.

    Args:
        model: a [`DnDForImageGeneration`].
        storage: memory for the keys and values, `(layers, 2, batch, heads, positions, head_dim)`.
    """

    context = nullcontext

    def __init__(self, model: nn.Module, storage: Tensor):
        self.head = model.head
        self.rotary = model.rotary_embeddings(storage.device, storage.dtype)
        self.caches = [KeyValueCache(*layer) for layer in storage]
        self.layers = [partial(layer, past_key_values=cache) for layer, cache in zip(model.layers, self.caches)]

    def at(self, position: int) -> dict:
        """What the layers are called with at a position; positions come in order, from 0."""
        for cache in self.caches:
            cache.position = position
        return dict(position_embeddings=tuple(table[:, position, None] for table in self.rotary), attention_mask=None)


class StaticCache:
    """Keys and values of one layer, of which `update` always returns the same part.

    Args:
        keys, values: memory for them, `(batch, heads, positions, head_dim)`.
        position: `(1,)` int64: where the next token is written.
    """

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor):
        self.keys, self.values, self.position, self.filled = keys, values, position, 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Writes a `(batch, heads, 1, head_dim)` key and value at `position`; returns the first `filled` of all."""
        self.keys.index_copy_(2, self.position, key)
        self.values.index_copy_(2, self.position, value)
        return self.keys.narrow(2, 0, self.filled), self.values.narrow(2, 0, self.filled)


class StaticDecoder:
    """The layers of a model as they are, in operations whose shapes do not change from one position to the next.

    Between positions that are multiples of `POSITIONS_IN_GRAPH` a step can be captured and replayed: the position is
    read on the device, attention reads the cache up to the next multiple, and a mask hides what is not filled.

    Args:
        model: a [`DnDForImageGeneration`] with `"sdpa"` or `"eager"` attention.
        batch: sequences, null ones included.
        position: `(1,)` int64 on the device of the model: the position of the next token.
    """

    context = nullcontext

    def __init__(self, model: nn.Module, batch: int, position: Tensor):
        self.head, self.position = model.head, position
        self.rotary = model.rotary_embeddings(model.device, model.dtype)
        self.storage = torch.zeros(model.cache_shape(batch), dtype=model.dtype, device=model.device)
        self.caches = [StaticCache(*layer, position) for layer in self.storage]
        self.layers = [partial(layer, past_key_values=cache) for layer, cache in zip(model.layers, self.caches)]
        length = model.config.sequence_length
        future = torch.full([length, length], -torch.inf, dtype=model.dtype, device=model.device)
        self.masks = future.triu(1)

    def read(self, position: int) -> int:
        """How much of the cache is read at a position."""
        return min(position - position % POSITIONS_IN_GRAPH + POSITIONS_IN_GRAPH, len(self.masks))

    def at(self, position: int) -> dict:
        """What the layers are called with at a position and at all others that read as much of the cache."""
        filled = self.read(position)
        for cache in self.caches:
            cache.filled = filled
        rotary = tuple(table.index_select(1, self.position) for table in self.rotary)
        mask = self.masks.index_select(0, self.position)[None, None, :, :filled]
        return dict(position_embeddings=rotary, attention_mask=mask)


class PackedDecoder:
    """The layers of a model on a CPU in few operations, with copies of the weights in oneDNN's own layout.

    A product of few rows takes as long as its weight takes to read, which is fastest in that layout (`torch.compile`
    packs frozen weights likewise). The cache is contiguous, since a product would copy it first otherwise: it grows by
    `POSITIONS_AT_ONCE`, and a mask hides what is not filled.

    Args:
        model: a [`DnDForImageGeneration`] whose weights do not change while this is in use.
        batch: sequences, null ones included.
    """

    context = torch.inference_mode
    """In which steps run: nobody else has the tensors that they make."""

    def __init__(self, model: nn.Module, batch: int):
        config = model.config
        heads = [joined([head], batch) for head in model.heads]
        self.head = lambda k: heads[k % len(heads)]  # one for all depths, or one each
        self.layers = [PackedLayer(layer, batch) for layer in model.layers[: config.prediction_layers[-1] + 1]]
        cos, sin = (table[0, :, None] for table in model.rotary_embeddings(model.device, model.dtype))
        left, right = sin.chunk(2, -1)
        self.rotary = cos, torch.cat([-left, right], dim=-1)  # so that turning takes no negation
        self.mask = torch.full([config.sequence_length], -torch.inf, dtype=model.dtype)

    @staticmethod
    def can_run(model: nn.Module) -> bool:
        """Whether the model is as it was built, on a CPU, and in a precision for which oneDNN is there."""
        if not all(can_pack(weight) for weight in model.parameters()):
            return False
        parts = dict(model.layers.named_modules()) | dict(model.heads.named_modules(prefix="heads"))
        linear = [part for name, part in parts.items() if name.endswith("_proj")] + list(model.heads)
        own = (
            vars(part).keys() & {"forward"} or part._forward_hooks or part._forward_pre_hooks for part in parts.values()
        )
        norms = [part for name, part in parts.items() if name.endswith("layernorm")]
        as_built = all(type(layer) is nn.Linear for layer in linear) and all(type(norm) is nn.RMSNorm for norm in norms)
        return as_built and not any(own)

    def at(self, position: int) -> dict:
        """What the layers are called with at a position; positions come in order, from 0."""
        if position % POSITIONS_AT_ONCE == 0:
            grown = min(POSITIONS_AT_ONCE, len(self.mask) - position)
            for layer in self.layers:
                layer.grow(grown)
        self.mask[position] = 0
        cos, sin = self.rotary
        return dict(position=position, cos=cos[position], sin=sin[position], mask=self.mask)


def joined(layers: list[nn.Linear], rows: int) -> PackedLinear:
    """Linear layers of the same input as one product, whose outputs stand side by side."""
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return PackedLinear(torch.cat([layer.weight for layer in layers]), bias, rows)


class FusedNorm:
    """RMS norm by the kernel that CPUs have for layer norm: over [x, -x], whose mean is zero, the two are the same."""

    def __init__(self, norm: nn.RMSNorm):
        self.weight, self.eps = norm.weight.repeat(2), norm.eps

    def __call__(self, hidden_states: Tensor) -> Tensor:
        both = torch.cat([hidden_states, -hidden_states], dim=-1)
        return F.layer_norm(both, self.weight.shape, self.weight, None, self.eps)[..., : hidden_states.shape[-1]]


class PackedLayer:
    """A decoder layer for one token of each of `batch` sequences."""

    def __init__(self, layer: nn.Module, batch: int):
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim, self.scaling, self.act_fn = attention.head_dim, attention.scaling, mlp.act_fn
        self.kv_heads = attention.config.num_key_value_heads
        self.attention_norm, self.mlp_norm = FusedNorm(layer.input_layernorm), FusedNorm(layer.post_attention_layernorm)
        self.qkv_proj = joined([attention.q_proj, attention.k_proj, attention.v_proj], batch)
        self.o_proj = joined([attention.o_proj], batch)
        self.gate_up_proj = joined([mlp.gate_proj, mlp.up_proj], batch)
        self.down_proj = joined([mlp.down_proj], batch)
        weight = attention.o_proj.weight
        self.keys = self.values = weight.new_empty(batch * self.kv_heads, 0, self.head_dim)

    def grow(self, positions: int) -> None:
        """Makes room for so many more positions in the cache."""
        room = self.keys.new_zeros(len(self.keys), positions, self.head_dim)
        self.keys, self.values = (torch.cat([filled, room], dim=1) for filled in (self.keys, self.values))

    def __call__(self, hidden_states: Tensor, position: int, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """`(batch, 1, hidden_size)` to the same; cosines and sines `(1, head_dim)`, mask `(sequence_length,)`."""
        batch, sequences = len(hidden_states), len(self.keys)
        qkv = self.qkv_proj(self.attention_norm(hidden_states)).view(batch, -1, self.head_dim)
        turned, value = qkv[:, : -self.kv_heads], qkv[:, -self.kv_heads :]
        turned = torch.addcmul(turned * cos, turned.roll(self.head_dim // 2, -1), sin)
        query, key = turned[:, : -self.kv_heads] * self.scaling, turned[:, -self.kv_heads :]
        self.keys[:, position] = key.reshape(sequences, -1)
        self.values[:, position] = value.reshape(sequences, -1)
        query = query.view(sequences, -1, self.head_dim)  # heads that share keys are the rows of one product
        scores = (query @ self.keys.mT).add_(mask[: self.keys.shape[1]])
        attended = (scores.softmax(-1) @ self.values).view_as(hidden_states)
        hidden_states = hidden_states + self.o_proj(attended)
        gate, up = self.gate_up_proj(self.mlp_norm(hidden_states)).chunk(2, -1)
        return hidden_states + self.down_proj(self.act_fn(gate) * up)
