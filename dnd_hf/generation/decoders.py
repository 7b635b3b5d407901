"""How generate() runs the layers for new tokens: as they are, or in operations of fixed shapes for CUDA graphs.

The third way, packed for CPUs, has a file of its own (`packed_decoder.py`). All three are a [`Decoder`] for each stack
of layers; a [`ModelRunner`] is what a sampling loop gets.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .interface import Decoder, ImageCodeModel, Layer, LayerStack


POSITIONS_IN_GRAPH = 64
"""How many positions of a `StaticDecoder` read the same part of the cache, and so share a CUDA graph."""


@dataclass(frozen=True)
class ModelRunner:
    """A model, ready to decode.

    Args:
        decoders: one for each of its stacks of layers.
        heads: what makes the logits of each depth from what head k reads.
        context: in which all steps run.
    """

    decoders: Sequence[Decoder]
    heads: Sequence[Callable[[Tensor], Tensor]]
    context: Callable[[], AbstractContextManager] = nullcontext


def head_of_each_depth(heads: Iterable[Callable[[Tensor], Tensor]], depth: int) -> list[Callable[[Tensor], Tensor]]:
    """Heads, one for all depths or one for each, as a list of one for each."""
    heads = list(heads)
    return heads * depth if len(heads) == 1 else heads


def plain_runner(model: ImageCodeModel, rows: int, device: torch.device, count: int = 1) -> ModelRunner:
    """The layers of a model as they are, hooks, adapters and quantized weights included, on any device.

    For passes that choose the codes of up to `count` cells of each of `rows` sequences.
    """
    attention, (first, *others) = model.config._attn_implementation, model.layer_stacks(device)
    stacks = ((first, rows), *((stack, rows * count) for stack in others))
    decoders = [PlainDecoder(*stack, device, model.dtype, attention) for stack in stacks]
    return ModelRunner(decoders, head_of_each_depth(model.heads, model.config.code_depth))


def static_runner(model: ImageCodeModel, rows: int, device: torch.device, count: int = 1) -> ModelRunner:
    """The layers as they are, in a step that can be captured: the position in the first stack is read on the device.

    For passes that choose the codes of up to `count` cells of each of `rows` sequences. The positions in further stacks
    are the depths, which are the same in every step.
    """
    first, *others = model.layer_stacks(device)
    attention = model.config._attn_implementation
    decoders: list[Decoder] = [
        StaticDecoder(first, rows, device, model.dtype),
        *(PlainDecoder(stack, rows * count, device, model.dtype, attention) for stack in others),
    ]
    heads = head_of_each_depth(model.heads, model.config.code_depth)
    return ModelRunner(decoders, heads, partial(static_context, device.type))


@contextmanager
def static_context(device_type: str) -> Iterator[None]:
    """In which static steps run: their memory outlives a call, and the weights decide the precision."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def cache_memory(stack: LayerStack, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Memory for the keys and values of a stack: `(layers, 2, rows, heads, length, head_dim)`."""
    shape = (len(stack.layers), 2, rows, stack.num_key_value_heads, stack.length, stack.head_dim)
    return torch.empty(shape, dtype=dtype, device=device)


def causal_mask(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`(length, length)`: what is added to the scores of each position, -inf for those after it."""
    return torch.full([length, length], -torch.inf, dtype=dtype, device=device).triu(1)


def causal_block_mask(position: int, count: int, device: torch.device) -> BlockMask:
    """The same for `count` tokens from `position` on, as flex attention takes it."""

    def sees(batch, head, query, key):
        return query + position >= key

    return create_block_mask(sees, B=None, H=None, Q_LEN=count, KV_LEN=position + count, device=device)


class FilledKeysValues:
    """Keys and values of one layer, of which its attention gets the part that is filled.

    The parts are views, so nothing is copied and one token needs no mask.

    Args:
        keys, values: memory for them, `(rows, heads, length, head_dim)`.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.position = keys, values, 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Writes `(rows, heads, tokens, head_dim)` keys and values from `position` on; returns all up to their end.

        There may be fewer rows than memory for them.
        """
        (rows, _, count, _), filled = key.shape, self.position + key.shape[2]
        keys, values = (kept.narrow(0, 0, rows).narrow(2, 0, filled) for kept in (self.keys, self.values))
        keys.narrow(2, self.position, count).copy_(key)
        values.narrow(2, self.position, count).copy_(value)
        return keys, values


class PlainDecoder:
    """A [`Decoder`] that calls the layers as they are.

    Args:
        attention: the implementation, by its name in transformers.
    """

    def __init__(self, stack: LayerStack, rows: int, device: torch.device, dtype: torch.dtype, attention: str):
        self.stack, self.attention = stack, attention
        self.memory = cache_memory(stack, rows, device, dtype)
        self.caches = [FilledKeysValues(*layer) for layer in self.memory]

    def at(self, position: int, count: int = 1) -> list[Layer]:
        end = position + count
        for cache in self.caches:
            cache.position = position
        options: dict[str, Any] = dict(attention_mask=None)
        if count > 1 and "flex" in self.attention:
            options["attention_mask"] = causal_block_mask(position, count, self.memory.device)
        elif count > 1 and "flash" not in self.attention:
            mask = causal_mask(end, self.memory.device, self.memory.dtype)[position:]
            options["attention_mask"] = mask.expand(self.memory.shape[2], 1, -1, -1)
        if self.stack.rotary is not None:
            options["position_embeddings"] = tuple(table[:, position:end] for table in self.stack.rotary)
        return [
            partial(layer, past_key_values=cache, **options) for layer, cache in zip(self.stack.layers, self.caches)
        ]

    def reorder(self, rows: Tensor) -> None:
        self.memory.copy_(self.memory[:, :, rows])


class FixedKeysValues:
    """Keys and values of one layer, of which its attention always gets the same part, filled or not.

    Args:
        keys, values: memory for them, `(rows, heads, length, head_dim)`.
        positions: `(tokens,)` int64: where the next tokens are written.
    """

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor):
        self.keys, self.values, self.positions, self.read = keys, values, positions, 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Writes `(rows, heads, tokens, head_dim)` keys and values at `positions`; returns the first `read` of all."""
        self.keys.index_copy_(2, self.positions, key)
        self.values.index_copy_(2, self.positions, value)
        return self.keys.narrow(2, 0, self.read), self.values.narrow(2, 0, self.read)


class StaticDecoder:
    """A [`Decoder`] that calls the layers as they are, in operations whose shapes do not change with the position.

    Between multiples of `POSITIONS_IN_GRAPH` a step can be captured and replayed: the position is read on the device,
    attention reads the cache up to the next multiple, and a mask hides what is not filled, which must be finite. Needs
    `"sdpa"` or `"eager"` attention.
    """

    def __init__(self, stack: LayerStack, rows: int, device: torch.device, dtype: torch.dtype):
        self.stack = stack
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        """`(1,)`: the position of the next token, which the loop counts up."""
        self.memory = cache_memory(stack, rows, device, dtype)
        self.caches = [FixedKeysValues(keys, values, self.position) for keys, values in self.memory]
        self.masks = causal_mask(stack.length, device, dtype)

    def read_at(self, position: int) -> int:
        """How much of the cache is read at a position."""
        return min(position - position % POSITIONS_IN_GRAPH + POSITIONS_IN_GRAPH, self.stack.length)

    def at(self, position: int, count: int = 1) -> list[Layer]:
        """The layers, for the position on the device; `position` only says how much of the cache is read."""
        positions, read = self.position, self.read_at(position + count - 1)
        if count > 1:
            positions = positions + torch.arange(count, device=positions.device)
        for cache in self.caches:
            cache.positions, cache.read = positions, read
        options: dict[str, Any] = dict(attention_mask=self.masks.index_select(0, positions)[None, None, :, :read])
        if self.stack.rotary is not None:
            options["position_embeddings"] = tuple(table.index_select(1, positions) for table in self.stack.rotary)
        return [
            partial(layer, past_key_values=cache, **options) for layer, cache in zip(self.stack.layers, self.caches)
        ]

    def reorder(self, rows: Tensor) -> None:
        self.memory.copy_(self.memory[:, :, rows])
