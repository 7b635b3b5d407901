"""Numbers as users give them, checked: counts, sizes (height, width), shares, positive numbers."""

import math
import numbers
import operator
from collections.abc import Sequence


def whole_number(name: str, value: int, minimum: int | None = 1, maximum: int | None = None) -> int:
    """`value` as an int; NumPy's integers are taken, booleans and fractions are not.

    Raises ValueError, starting with `name`, for anything else or outside `[minimum, maximum]`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
    if minimum is not None and number < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
    if maximum is not None and number > maximum:
        raise ValueError(f"`{name}` must be at most {maximum}, got {value}.")
    return number


def height_width(name: str, value: int | Sequence[int], maximum: int | None = None) -> tuple[int, int]:
    """`256`, `[256]` or `[height, width]` as (height, width).

    Raises ValueError, starting with `name`, for anything but one or two whole numbers in `[1, maximum]`.
    """
    sides = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if len(sides) not in (1, 2):
        raise ValueError(f"`{name}` must be one whole number or (height, width), got {value}.")
    height, width = (whole_number(name, side, maximum=maximum) for side in (sides[0], sides[-1]))
    return height, width


def check_share(name: str, value: float) -> None:
    """Raises ValueError, starting with `name`, unless `value` lies in [0, 1)."""
    if not (_is_number(value) and 0 <= value < 1):
        raise ValueError(f"`{name}` must lie in [0, 1), got {value}.")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError, starting with `name`, unless `value` is finite and greater than 0."""
    if not (_is_number(value) and math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be finite and greater than 0, got {value}.")


def check_not_negative(name: str, value: float) -> None:
    """Raises ValueError, starting with `name`, unless `value` is finite and at least 0."""
    if not (_is_number(value) and math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be finite and at least 0, got {value}.")


def _is_number(value: float) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
