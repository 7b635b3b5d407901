"""Half precision on CPUs: whether a processor has instructions for it, and a warning where it has none."""

from functools import cache
from logging import getLogger

import torch


def has_instructions(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device multiplies matrices of a precision by instructions of its own: all do, but not all CPUs.

    Of a CPU for which PyTorch has no oneDNN nobody knows, and the answer is True.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return True
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def warn_of_slow_precision(device: torch.device, dtype: torch.dtype) -> None:
    """Warns, once for each precision, where a model computes in one that this CPU can only emulate."""
    if not torch.compiler.is_compiling() and not has_instructions(device, dtype):
        _warn(dtype)


@cache
def _warn(dtype: torch.dtype) -> None:
    getLogger(__name__).warning(
        "This CPU has no instructions for %s: models take several times as long as in float32, and encoding images up"
        " to a hundred times. Use float32 here.",
        str(dtype).removeprefix("torch."),
    )
