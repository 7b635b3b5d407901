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

from ..ops.cpu_precision import warn_of_slow_precision
from .interface import Decoder, ImageCodeModel, Layer, LayerStack, Position


POSITIONS_IN_GRAPH = 64
"""How many positions of a `StaticDecoder` read the same part of the cache, and so share a CUDA graph."""


@dataclass(frozen=True)
class ModelRunner:
    """A model, ready to decode.

    Args:
        decoders: one for each of its stacks of layers.
        heads: what makes the logits of each depth from what head k reads.
        context: in which all steps run.
        together: whether the first decoder only takes one position for all sequences.
    """

    decoders: Sequence[Decoder]
    heads: Sequence[Callable[[Tensor], Tensor]]
    context: Callable[[], AbstractContextManager] = nullcontext
    together: bool = False


def head_of_each_depth(heads: Iterable[Callable[[Tensor], Tensor]], depth: int) -> list[Callable[[Tensor], Tensor]]:
    """Heads, one for all depths or one for each, as a list of one for each."""
    heads = list(heads)
    return heads * depth if len(heads) == 1 else heads


def plain_runner(model: ImageCodeModel, rows: int, device: torch.device, count: int = 1) -> ModelRunner:
    """The layers of a model as they are, hooks, adapters and quantized weights included, on any device.

    For passes that choose the codes of up to `count` cells of each of `rows` sequences. Flash attention knows no other
    mask than the causal one up to the last position, so with it all sequences are at the same.
    """
    warn_of_slow_precision(device, model.dtype)
    attention, (first, *others) = model.config._attn_implementation, model.layer_stacks(device)
    stacks = ((first, rows), *((stack, rows * count) for stack in others))
    decoders = [PlainDecoder(*stack, device, model.dtype, attention) for stack in stacks]
    heads = head_of_each_depth(model.heads, model.config.code_depth)
    return ModelRunner(decoders, heads, together="flash" in attention)


def static_runner(model: ImageCodeModel, rows: int, device: torch.device, count: int = 1) -> ModelRunner:
    """The layers as they are, in a step that can be captured: positions in the first stack are read on the device.

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
    """Memory for the keys and values of a stack, `(layers, 2, rows, heads, length, head_dim)`; what is masked must be
    finite."""
    shape = (len(stack.layers), 2, rows, stack.num_key_value_heads, stack.length, stack.head_dim)
    return torch.zeros(shape, dtype=dtype, device=device)


def causal_mask(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`(length, length)`: what is added to the scores of each position, -inf for those after it."""
    return torch.full([length, length], -torch.inf, dtype=dtype, device=device).triu(1)


def causal_block_mask(position: Position, count: int, device: torch.device) -> BlockMask:
    """The same for `count` tokens from `position` on, as flex attention takes it."""
    if isinstance(position, int):
        rows, end = None, position + count
    else:
        rows, end, positions = len(position), max(position) + count, torch.tensor(position, device=device)

    def sees(row, head, query, key):
        return query + (position if rows is None else positions[row]) >= key

    return create_block_mask(sees, B=rows, H=None, Q_LEN=count, KV_LEN=end, device=device)


def positions_of_tokens(position: list[int], count: int, device: torch.device) -> Tensor:
    """`(rows, count)` int64: of `count` tokens of each sequence, where the first is at `position`."""
    return one_a_row(position, device) + torch.arange(count, device=device)


def one_a_row(values: list[int], device: torch.device) -> Tensor:
    """`(rows, 1)` int64 on the device, which nothing waits for."""
    if len(set(values)) == 1:
        return torch.full([len(values), 1], values[0], device=device)
    return torch.tensor(values).to(device, non_blocking=True)[:, None]


def write_at(positions_RT: Tensor, memory: Tensor, new: Tensor) -> None:
    """Writes keys or values `(rows, heads, tokens, head_dim)` where their positions are in the memory of as many rows,
    `(rows, heads, length, head_dim)`."""
    rows = torch.arange(len(new), device=new.device)[:, None]
    memory[rows, :, positions_RT] = new.transpose(1, 2)


class FilledKeysValues:
    """Keys and values of one layer, of which its attention gets the part that is filled.

    The parts are views, so nothing is copied and one token at the same position of all sequences needs no mask.

    Args:
        keys, values: memory for them, `(rows, heads, length, head_dim)`.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.filled = keys, values, 0
        self.positions: Tensor | None = None
        """`(rows, tokens)`: where the next tokens are written; None: they are the last that are filled."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Writes `(rows, heads, tokens, head_dim)` keys and values; returns what is filled then.

        There may be fewer rows than memory for them.
        """
        rows, _, count, _ = key.shape
        keys, values = (kept.narrow(0, 0, rows).narrow(2, 0, self.filled) for kept in (self.keys, self.values))
        if self.positions is None:
            keys.narrow(2, self.filled - count, count).copy_(key)
            values.narrow(2, self.filled - count, count).copy_(value)
        else:
            write_at(self.positions, keys, key)
            write_at(self.positions, values, value)
        return keys, values


class PlainDecoder:
    """A [`Decoder`] that calls the layers as they are.

    Args:
        attention: the implementation, by its name in transformers.
    """

    def __init__(self, stack: LayerStack, rows: int, device: torch.device, dtype: torch.dtype, attention: str):
        self.stack, self.attention = stack, attention
        self.keep(cache_memory(stack, rows, device, dtype))

    def keep(self, memory: Tensor) -> None:
        """Takes the memory of the keys and values of all layers."""
        self.memory = memory
        self.caches = [FilledKeysValues(*layer) for layer in memory]

    def at(self, position: Position, count: int = 1) -> list[Layer]:
        device, rotary = self.memory.device, self.stack.rotary or ()
        positions: Tensor | None = None
        if isinstance(position, int):
            end = position + count
            tables = [table[:, position:end] for table in rotary]
        else:
            end, positions = max(position) + count, positions_of_tokens(position, count, device)
            tables = [table[0, positions] for table in rotary]
        for cache in self.caches:
            cache.filled, cache.positions = end, positions
        options: dict[str, Any] = dict(attention_mask=None)
        if (count > 1 or positions is not None) and "flex" in self.attention:
            options["attention_mask"] = causal_block_mask(position, count, device)
        elif (count > 1 or positions is not None) and "flash" not in self.attention:
            mask = causal_mask(end, device, self.memory.dtype)
            mask = mask[end - count :] if positions is None else mask[positions]
            options["attention_mask"] = mask.expand(self.memory.shape[2], count, end)[:, None]
        if tables:
            options["position_embeddings"] = tuple(tables)
        return [
            partial(layer, past_key_values=cache, **options) for layer, cache in zip(self.stack.layers, self.caches)
        ]

    def reorder(self, rows: Tensor) -> None:
        self.keep(self.memory[:, :, rows])


class FixedKeysValues:
    """Keys and values of one layer, of which its attention always gets the same part, filled or not.

    Args:
        keys, values: memory for them, `(rows, heads, length, head_dim)`.
        positions: `(rows, tokens)` int64: where the next tokens are written.
    """

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor):
        self.keys, self.values, self.positions, self.read = keys, values, positions, 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Writes `(rows, heads, tokens, head_dim)` keys and values at `positions`; returns the first `read` of all."""
        write_at(self.positions, self.keys, key)
        write_at(self.positions, self.values, value)
        return self.keys.narrow(2, 0, self.read), self.values.narrow(2, 0, self.read)


class StaticDecoder:
    """A [`Decoder`] that calls the layers as they are, in operations whose shapes do not change with the positions.

    Between multiples of `POSITIONS_IN_GRAPH` a step can be captured and replayed: positions are read on the device,
    attention reads the cache up to the next multiple, and a mask hides what is not filled, which must be finite. Needs
    `"sdpa"` or `"eager"` attention.
    """

    def __init__(self, stack: LayerStack, rows: int, device: torch.device, dtype: torch.dtype):
        self.stack = stack
        self.position = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        """`(rows, 1)`: the position of the next token of each sequence, which the loop sets."""
        self.memory = cache_memory(stack, rows, device, dtype)
        self.caches = [FixedKeysValues(keys, values, self.position) for keys, values in self.memory]
        self.masks = causal_mask(stack.length, device, dtype)

    def read_at(self, position: int) -> int:
        """How much of the cache is read at a position."""
        return min(position - position % POSITIONS_IN_GRAPH + POSITIONS_IN_GRAPH, self.stack.length)

    def at(self, position: Position, count: int = 1) -> list[Layer]:
        """The layers, for the positions on the device; `position` only says how much of the cache is read."""
        last = position if isinstance(position, int) else max(position)
        read, positions = self.read_at(last + count - 1), self.position
        if count > 1:
            positions = positions + torch.arange(count, device=positions.device)
        for cache in self.caches:
            cache.positions, cache.read = positions, read
        options: dict[str, Any] = dict(attention_mask=self.masks[:, :read][positions][:, None])
        if self.stack.rotary is not None:
            options["position_embeddings"] = tuple(table[0, positions] for table in self.stack.rotary)
        return [
            partial(layer, past_key_values=cache, **options) for layer, cache in zip(self.stack.layers, self.caches)
        ]

    def reorder(self, rows: Tensor) -> None:
        self.memory.copy_(self.memory[:, :, rows])
