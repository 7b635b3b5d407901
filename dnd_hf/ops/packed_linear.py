"""Matrix products on CPUs with the weight in oneDNN's own layout, as `torch.compile` packs frozen weights.

[`PackedLinear`] is such a product; [`ReleasedLinear`] is a linear layer that has no other copy of its weight.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu_precision import has_instructions


def can_pack(tensor: Tensor) -> bool:
    """Whether oneDNN is there for the device and the precision of a tensor, and it is a plain one.

    A tensor of a subclass (quantized, sharded) holds its numbers in another way.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    if tensor.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return tensor.dtype in (torch.float32, torch.bfloat16) and has_instructions(tensor.device, tensor.dtype)


class PackedLinear:
    """`inputs @ weight.T + bias` without gradients; the weight is packed where that can be done.

    Args:
        weight: `(out_features, in_features)`.
        bias: `(out_features,)` or None.
        rows: about how many rows the inputs will have. Up to 128 rows, layouts made for 16 and more are equally fast.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int = 16):
        self.in_features, self.packed = weight.shape[1], can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows) if self.packed else weight
        self.bias = bias

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return F.linear(inputs, self.weight, self.bias)

    def plain_weight(self) -> Tensor:
        """The weight as it was given, a copy where it is packed."""
        return self.weight.to_dense() if self.packed else self.weight


class ReleasedLinear(nn.Linear):
    """A linear layer whose weight and bias exist only inside a [`PackedLinear`]; made by [`release`].

    Its parameters are on the "meta" device: they count, but hold nothing. Its state dict is right. What would need the
    weights themselves (`forward`, loading, another precision or device, copying, pickling) raises a RuntimeError.
    """

    product: PackedLinear
    outputs: slice
    """Which outputs of the product are those of this layer."""

    def restored(self) -> tuple[Tensor, Tensor | None]:
        """Copies of the weight and of the bias."""
        weight, bias = self.product.plain_weight()[self.outputs].clone(), self.product.bias
        return weight, None if bias is None else bias.detach()[self.outputs].clone()

    def refuse(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{what} needs the weights, which `pack_for_cpu` has let go of: call `unpack_weights()` on the model first."
        )

    def forward(self, input: Tensor) -> Tensor:
        raise self.refuse("forward()")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        names = ("weight", "bias")
        destination.update({prefix + n: value for n, value in zip(names, self.restored()) if value is not None})

    def _load_from_state_dict(self, *args, **kwargs):
        raise self.refuse("load_state_dict()")

    def _apply(self, fn, recurse=True):
        if changes_tensors(fn, self.weight.dtype):
            raise self.refuse("Another precision or device")
        return self

    def __reduce_ex__(self, protocol):
        raise self.refuse("A copy")


def changes_tensors(fn, dtype: torch.dtype) -> bool:
    """Whether what a module applies to its parameters gives those on a CPU another precision or device."""
    probe = fn(torch.empty(0, dtype=dtype))
    return probe.dtype != dtype or probe.device.type != "cpu"


def joined(layers: Sequence[nn.Linear]) -> PackedLinear:
    """Linear layers of the same input as one product, whose outputs stand side by side."""
    if len(layers) == 1:
        return PackedLinear(layers[0].weight, layers[0].bias)
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return PackedLinear(torch.cat([layer.weight for layer in layers]), bias)


def release(layers: Sequence[nn.Linear], product: PackedLinear) -> None:
    """Makes linear layers [`ReleasedLinear`] ones: their weights are those in the [`joined`] product only."""
    start = 0
    for layer in layers:
        _replace_parameters(layer, layer.weight.to("meta"), None if layer.bias is None else layer.bias.to("meta"))
        layer.__class__ = ReleasedLinear
        released = cast(ReleasedLinear, layer)
        released.product, released.outputs = product, slice(start, start + layer.out_features)
        start += layer.out_features


def restore(layers: Sequence[ReleasedLinear]) -> None:
    """Makes released layers plain ones again."""
    for layer in layers:
        weights = layer.restored()
        layer.__class__ = nn.Linear  # type: ignore[assignment]
        _replace_parameters(layer, *weights)
    for layer in layers:
        del layer.product, layer.outputs


def _replace_parameters(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
