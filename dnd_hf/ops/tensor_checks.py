"""What may be asked of the values of tensors, and when: looking at them makes the host wait for a GPU."""

import torch
from torch import Tensor


def can_look(tensor: Tensor) -> bool:
    """Whether values can be looked at without making the host wait for a GPU or breaking a compiled graph."""
    return tensor.device.type not in ("cuda", "meta") and not torch.compiler.is_compiling()


def check_integers(name: str, value: Tensor, limit: int, ignored: int | None = None, wait: bool = False) -> None:
    """Checks that `value` holds integers in `[0, limit)`, or `ignored`.

    Without `wait`, a GPU checks the range itself while the host runs on: the error is then CUDA's device-side
    assertion, its message on stderr. A compiled graph checks the type only.

    Raises:
        ValueError: another type or range; the message starts with `name`.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {type(value).__name__}.")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"`{name}` must be integers, got {value.dtype}.")
    value = value.long()  # few operations know all integer types
    if torch.compiler.is_compiling() or value.is_meta or not value.numel():
        return
    allowed = f"[0, {limit})" + ("" if ignored is None else f" or be {ignored}")
    inside = (value >= 0) & (value < limit)
    if ignored is not None:
        inside |= value == ignored
    if not (wait or can_look(value)):
        torch._assert_async(inside.all(), f"`{name}` must lie in {allowed}.")
    elif not inside.all():
        low, high = (bound.item() for bound in value.aminmax())
        raise ValueError(f"`{name}` must lie in {allowed}, got {low} to {high}.")


def check_finite(name: str, value: Tensor) -> None:
    """Raises ValueError, starting with `name`, where a value is NaN or infinite. Waits for a GPU.

    A compiled graph does not look.
    """
    if not torch.compiler.is_compiling() and not value.is_meta and not value.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
