"""The packed weights of a model on a CPU: made once, kept while its weights stay as they are, or its only ones.

Nobody has to say that weights have changed: each call compares checksums of all that is packed, which takes as long as
reading the weights once, and every step reads them once.
"""

from collections.abc import Hashable, Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..ops.checksums import checksum
from ..ops.packed_linear import PackedLinear, ReleasedLinear, can_pack, joined
from .interface import ImageCodeModel


class PackedWeights:
    """Products of linear layers, packed once for each content of their weights. Safe to use from several threads."""

    def __init__(self):
        self.products: dict[Hashable, PackedLinear] = {}
        self.lock = Lock()

    def take(self, groups: Sequence[Sequence[nn.Linear]], keep: bool = True) -> list[PackedLinear]:
        """The product of each group of layers that read the same input; those kept of other weights are dropped.

        Args:
            keep: for later calls; False for weights that are about to change.
        """
        with self.lock, torch.no_grad():
            keys = [contents(group) for group in groups]
            products = self.products = {key: self.products[key] for key in keys if key in self.products}
            if not keep:
                self.products = {}
            for key, group in zip(keys, groups):
                if key not in products:
                    products[key] = _product(group)
            return [products[key] for key in keys]


KEPT_WEIGHTS: WeakKeyDictionary[Any, PackedWeights] = WeakKeyDictionary()
"""Of each model; they end with it, and copies and saved models know nothing of them."""
KEPT_WEIGHTS_LOCK = Lock()


def packed_weights(model: ImageCodeModel) -> PackedWeights:
    """What is kept of a model."""
    with KEPT_WEIGHTS_LOCK:
        return KEPT_WEIGHTS.setdefault(model, PackedWeights())


def contents(group: Sequence[nn.Linear]) -> Hashable:
    """What a joined product depends on. Equal for layers of equal weights; then so is the product."""
    if isinstance(group[0], ReleasedLinear):
        return id(group[0].product)
    return tuple(
        (tuple(weight.shape), weight.dtype, checksum(weight)) for layer in group for weight in layer.parameters()
    )


def _product(group: Sequence[nn.Linear]) -> PackedLinear:
    return group[0].product if isinstance(group[0], ReleasedLinear) else joined(group)


def groups_of_layer(layer: Any) -> list[list[nn.Linear]]:
    """The linear layers of a transformer block in order, those together that read the same input: four groups."""
    attention, mlp = layer.self_attn, layer.mlp
    first = [mlp.gate_proj, mlp.up_proj] if hasattr(mlp, "gate_proj") else [mlp.up_proj]
    return [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj], first, [mlp.down_proj]]


def product_groups(model: ImageCodeModel) -> list[list[Any]]:
    """The groups of all layers that `generate` runs, stack by stack, and then each head."""
    layers = [layer for stack in model.layer_stacks(model.device) for layer in stack.layers]
    return [group for layer in layers for group in groups_of_layer(layer)] + [[head] for head in model.heads]


def released_layers(model: Any) -> list[ReleasedLinear]:
    """The linear layers of a model whose weights are only packed."""
    return [module for module in model.modules() if isinstance(module, ReleasedLinear)]


def has_only_packable_weights(model: Any) -> bool:
    """Whether oneDNN is there for all weights that are not packed already."""
    modules = [module for module in model.modules() if not isinstance(module, ReleasedLinear)]
    return all(can_pack(weight) for module in modules for weight in module.parameters(recurse=False))
