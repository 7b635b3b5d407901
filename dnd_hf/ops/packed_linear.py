"""Matrix products on CPUs with a copy of the weight in oneDNN's own layout, as `torch.compile` packs frozen weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def can_pack(tensor: Tensor) -> bool:
    """Whether oneDNN is there for the device and the precision of a tensor, and it is a plain one.

    A tensor of a subclass (quantized, sharded) holds its numbers in another way.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    if tensor.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if tensor.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return tensor.dtype == torch.float32


class PackedLinear:
    """`inputs @ weight.T + bias` without gradients; the weight is packed where that can be done.

    Args:
        weight: `(out_features, in_features)`.
        bias: `(out_features,)` or None.
        rows: about how many rows the inputs will have.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        self.in_features, self.packed = weight.shape[1], can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows) if self.packed else weight
        self.bias = bias

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return F.linear(inputs, self.weight, self.bias)
