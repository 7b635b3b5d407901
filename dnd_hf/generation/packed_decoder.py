"""Decoding on CPUs in few operations, with the weights in oneDNN's own layout.

A product of few rows takes as long as its weight takes to read, which is fastest in that layout (`torch.compile` packs
frozen weights likewise). docs/benchmarks.md says what each step brought, and what did not help.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.decoding_kernels import decoding_kernels
from ..ops.packed_linear import ReleasedLinear
from .decoders import ModelRunner, causal_mask, head_of_each_depth, positions_of_tokens
from .interface import Decoder, ImageCodeModel, Layer, LayerStack, Position
from .kernel_layers import KernelDecoder
from .packed_layers import KeysValues, PackedLayer, signed_rotary
from .packed_weights import has_only_packable_weights, packed_weights, product_groups


POSITIONS_AT_ONCE = 32
"""By how many positions the cache of a `PackedDecoder` grows."""


def can_run_packed(model: ImageCodeModel) -> bool:
    """Whether all layers and heads are as they were built, on a CPU, and in a precision for which oneDNN is there."""
    if not has_only_packable_weights(model):
        return False
    layers = [layer for stack in model.layer_stacks(model.device) for layer in stack.layers]
    return all(map(_is_plain_linear, model.heads)) and all(map(_is_plain_block, layers))


def packed_runner(model: ImageCodeModel, rows: int, count: int = 1) -> ModelRunner:
    """A model as it is now: weights that change later do not change the runner.

    For passes that choose the codes of up to `count` cells of each of `rows` sequences. The packed weights are kept
    for later calls, except those of a model in training mode, which are about to change.
    """
    stacks = model.layer_stacks(model.device)
    products = iter(packed_weights(model).take(product_groups(model), keep=not model.training))
    kernels, decoders = decoding_kernels() if uses_kernels(model) else None, list[Decoder]()
    for index, stack in enumerate(stacks):
        layers = [PackedLayer(layer, list(islice(products, 4))) for layer in stack.layers]
        of = stack, layers, rows * count if index else rows, model.dtype
        decoders.append(PackedDecoder(*of) if kernels is None else KernelDecoder(*of, kernels))
    heads = head_of_each_depth(products, model.config.code_depth)
    return ModelRunner(decoders, heads, packed_context if torch.is_autocast_enabled("cpu") else torch.inference_mode)


def uses_kernels(model: ImageCodeModel) -> bool:
    """Whether the user asked for compiled kernels, and the weights are of one precision, as they need."""
    return model.cpu_kernels and all(weight.dtype == model.dtype for weight in model.parameters())


@contextmanager
def packed_context() -> Iterator[None]:
    """In which packed steps run: nobody else has the tensors that they make, and the weights decide the precision."""
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        yield


class PackedDecoder:
    """A [`Decoder`] over a contiguous cache, since a product would copy it first otherwise.

    The cache grows by `POSITIONS_AT_ONCE`, and a mask hides what is not filled.
    """

    def __init__(self, stack: LayerStack, layers: list[PackedLayer], rows: int, dtype: torch.dtype):
        self.layers = layers
        self.caches = [KeysValues(rows, stack.num_key_value_heads, stack.head_dim, dtype) for _ in layers]
        self.masks, self.room = causal_mask(stack.length, torch.device("cpu"), dtype), 0
        self.rotary = signed_rotary(stack)

    def at(self, position: Position, count: int = 1) -> list[Layer]:
        end = (position if isinstance(position, int) else max(position)) + count
        while self.room < end:
            grown = min(POSITIONS_AT_ONCE, len(self.masks) - self.room)
            for cache in self.caches:
                cache.grow(grown)
            self.room += grown
        where: slice | Tensor
        options: dict[str, Any] = dict(rotary=None)
        if isinstance(position, int):
            where = slice(position, end)
            options.update(places=position, mask=self.masks[where, : self.room])
        else:
            where = positions_of_tokens(position, count, torch.device("cpu"))
            options.update(places=self.caches[0].places(where), mask=self.masks[where, : self.room][:, None])
        if self.rotary is not None:
            options["rotary"] = tuple(table[where] for table in self.rotary)
        return [partial(layer, cache=cache, **options) for layer, cache in zip(self.layers, self.caches)]

    def reorder(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.reorder(rows)


def _is_plain_block(layer: nn.Module) -> bool:
    """Whether a layer consists of what [`PackedLayer`] reads, and nobody has hooked or replaced a part of it."""
    attention: Any = getattr(layer, "self_attn", None)
    mlp: Any = getattr(layer, "mlp", None)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    linear: list[Any] = [getattr(attention, name, None) for name in names] + [getattr(mlp, "up_proj", None)]
    linear += [getattr(mlp, "down_proj", None)] + ([mlp.gate_proj] if hasattr(mlp, "gate_proj") else [])
    norms: list[Any] = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    if not all(type(part) in (nn.Linear, ReleasedLinear) for part in linear):
        return False
    if not all(type(norm) in (nn.RMSNorm, nn.LayerNorm) and norm.weight is not None for norm in norms):
        return False
    known = {weight for part in (*linear, *norms) for weight in part.parameters()}
    return known == set(layer.parameters()) and not any(_is_changed(part) for part in layer.modules())


def _is_plain_linear(head: nn.Module) -> bool:
    return type(head) in (nn.Linear, ReleasedLinear) and not _is_changed(head)


def _is_changed(module: nn.Module) -> bool:
    """Whether it has hooks, or a `forward` of its own as the offloading of Accelerate gives it.

    The hooks by which transformers captures hidden states and attentions do nothing here.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    capturing = "transformers.utils.output_capturing"
    return "forward" in vars(module) or any(getattr(hook, "__module__", None) != capturing for hook in hooks)
