"""PackingMixin: `pack_for_cpu`, by which sampling on a CPU needs the memory of the weights once, and its undoing."""

import ctypes
from contextlib import suppress
from typing import Any

import torch

from ..ops.packed_linear import ReleasedLinear, joined, release, restore
from .packed_decoder import can_run_packed
from .packed_weights import packed_weights, product_groups, released_layers


class PackingMixin:
    """Adds `pack_for_cpu` and `unpack_weights`, for models that are only sampled from."""

    @property
    def is_packed_for_cpu(self) -> bool:
        """Whether the weights are only there as `pack_for_cpu` leaves them."""
        return bool(released_layers(self))

    @torch.inference_mode(False)
    @torch.no_grad()
    def pack_for_cpu(self: Any) -> None:
        """Packs the weights for sampling and lets go of the others: half the memory of `generate`, which keeps both.

        It goes layer by layer, so it needs little more memory than the weights. `generate`, `inpaint`, `score`,
        `state_dict` and `save_pretrained` work as before. `forward` and with it training, loading weights, another
        device or precision, copying and pickling raise a RuntimeError until `unpack_weights`, which gives the same
        weights again. The parameters are new objects after each of the two: make an optimizer behind them.

        Raises:
            ValueError: the model does not run packed: it is not on a CPU, in another precision than float32 or bfloat16
                (or this CPU has no oneDNN for it), or a layer has hooks, adapters or quantized weights.
        """
        if not can_run_packed(self):
            raise ValueError(
                "`pack_for_cpu` needs a model on a CPU in float32 or bfloat16, with oneDNN for it, whose layers have no"
                f" hooks, adapters or quantized weights; this one is {self.dtype} on {self.device}."
            )
        weights = packed_weights(self)
        with weights.lock:
            weights.products = {}
            for group in product_groups(self):
                if not isinstance(group[0], ReleasedLinear):
                    release(group, joined(group))
                    return_free_memory()

    @torch.inference_mode(False)
    @torch.no_grad()
    def unpack_weights(self: Any) -> None:
        """Undoes `pack_for_cpu`, layer by layer, and drops the packed copy that `generate` keeps."""
        weights = packed_weights(self)
        with weights.lock:
            weights.products = {}
            by_product: dict[int, list[ReleasedLinear]] = {}
            for layer in released_layers(self):
                by_product.setdefault(id(layer.product), []).append(layer)
            for layers in by_product.values():
                restore(layers)
                return_free_memory()

    def _apply(self: Any, fn, recurse=True):
        """As in `nn.Module`, but refused as a whole where released weights would have to change."""
        for layer in released_layers(self)[:1]:
            layer._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc] # of nn.Module, which comes after this


def return_free_memory() -> None:
    """Gives what has been freed back to the system at once. glibc keeps the holes between weights; others do not."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
