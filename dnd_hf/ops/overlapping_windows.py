"""Where windows of one size stand on a larger grid, so that they overlap and cover it."""

from .number_checks import height_width


def window_corners(
    grid_size: tuple[int, int], window_size: tuple[int, int], overlap: int | tuple[int, int] | None
) -> list[tuple[int, int]]:
    """(row, column) of the first cell of each window, from left to right and then down.

    Windows overlap by `overlap`; the last ones of a row and of a column end with the grid, and may overlap by more.

    Args:
        grid_size, window_size: (height, width) in cells.
        overlap: one number, or (rows, columns); `None`: half of the window.

    Raises:
        ValueError: a grid that is smaller than a window, or an overlap outside of `[1, window)` where it is larger.
    """
    sizes = height_width("grid_size", grid_size)
    if any(size < least for size, least in zip(sizes, window_size)):
        raise ValueError(f"`grid_size` must be at least the model's {window_size}, got {sizes}.")
    overlaps = tuple(n // 2 for n in window_size) if overlap is None else height_width("overlap", overlap)
    starts: list[list[int]] = []
    for size, window, shared in zip(sizes, window_size, overlaps):
        last = size - window
        if last and not 1 <= shared < window:
            raise ValueError(
                f"`overlap` must be at least 1 and less than the model's grid {window_size}, got {shared}."
            )
        starts.append([*range(0, last, window - shared), last])
    return [(top, left) for top in starts[0] for left in starts[1]]
