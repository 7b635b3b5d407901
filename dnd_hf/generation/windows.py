"""Which cells a pass samples: one by one, or several at a time with the same codes (exact parallel decoding).

The codes of a cell are a function of the codes before it and of the cell's own random numbers. So the codes of a window
of cells may be guessed and all be computed in one pass: those up to the first wrong guess had the right codes before
them, and are what one cell at a time gives. The window goes on behind them, with the others as new guesses. This is
Jacobi iteration with fixed noise (arXiv 2002.09928; speculative Jacobi decoding, arXiv 2410.01699). Each pass makes at
least one cell final, and only the sequential codes are a fixed point.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..ops.number_checks import whole_number
from .loop import SamplingLoop


ROWS_AT_ONCE = 16
"""Rows (sequences x cells) of a pass that `"auto"` tries: on a CPU more rows take about as much longer as they gain."""
SHORTEST_GRID = 64
"""Cells that a grid must have for `"auto"` to try."""
SINGLE_CELLS = 0.25
"""Share of the grid that `"auto"` samples one by one: with so little before them, guesses are rarely right."""
SINGLE_PASSES = 4
"""Passes of one cell that are timed at least."""
FIRST_CREDIT, LARGEST_CREDIT, EARNED_CREDIT = 6.0, 12.0, 0.02
"""How many passes of one cell `"auto"` may lose with a model at first, at most, and more for each cell that it samples
by itself: once it has found out that windows do not pay, it is slower by that share."""


def checked_positions_per_pass(value: int | str, sequence_length: int, cuda_graphs: bool) -> int | str:
    """The `positions_per_pass` of a call of `generate`; at most `sequence_length`.

    Raises:
        ValueError: it is neither `"auto"` nor a whole number of at least 1; or it is greater with CUDA graphs.
    """
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f'`positions_per_pass` must be "auto" or a whole number, got {value!r}.')
        return value
    count = whole_number("positions_per_pass", value)
    if count > 1 and cuda_graphs:
        raise ValueError(f'`positions_per_pass` must be 1 or "auto" with `cuda_graphs`, got {count}.')
    return min(count, sequence_length)


def one_cell_a_pass(loop: SamplingLoop, whole_L: Sequence[bool]) -> Iterator[int]:
    """Samples the cells one by one, and yields each when its codes are final.

    Args:
        whole_L: the cells of which no code is to be sampled.
    """
    for cell, whole in enumerate(whole_L):
        if not whole:
            loop.step(cell)
        yield cell


def several_cells_a_pass(
    loop: SamplingLoop, whole_L: Sequence[bool], width: int, credit: "Credit | None" = None
) -> Iterator[int]:
    """The same with up to `width` cells a pass.

    The images of a batch go on together, by the cells that are final in all of them; each keeps its own guesses.

    Args:
        credit: says when passes of several cells do not pay; None: they are made anyway.
    """
    cell, length = 0, len(whole_L)
    while cell < length:
        if whole_L[cell]:
            yield cell
            cell += 1
            continue
        count = min(width, length - cell) if credit is None or credit.allows(cell / length) else 1
        started = time.thread_time()
        final = loop.step_window(cell, count)
        if credit is not None:
            sampled = final - sum(whole_L[cell : cell + final])
            credit.count(count == 1, time.thread_time() - started, sampled)
        yield from range(cell, cell + final)
        cell += final


@dataclass
class Credit:
    """Whether passes of several cells pay, from what those of a model have taken and brought so far.

    Their gains, in passes of one cell, are what later ones may lose. The fastest pass of each kind counts, in time of
    this thread, whatever else the machine is busy with. The clock decides only how codes are computed, never which:
    `"auto"` is for precisions in which both ways give the same.
    """

    passes: float = FIRST_CREDIT
    single_passes: int = 0
    window_passes: int = 0
    single_seconds: float = float("inf")
    window_seconds: float = float("inf")

    @property
    def cost(self) -> float:
        """What a pass of several cells takes, in passes of one; the first of them may have to prepare kernels."""
        return max(1.0, self.window_seconds / self.single_seconds) if self.window_passes > 1 else 1.5

    def allows(self, progress: float) -> bool:
        """Whether the next pass may be of several cells, when this share of the grid is final."""
        return progress >= SINGLE_CELLS and self.single_passes >= SINGLE_PASSES and self.passes >= self.cost - 1

    def count(self, single: bool, seconds: float, cells: int) -> None:
        """Counts a pass, and the cells that it sampled."""
        if single:
            self.single_passes += 1
            self.single_seconds = min(self.single_seconds, seconds)
            self.passes += EARNED_CREDIT
        else:
            self.window_passes += 1
            self.window_seconds = min(self.window_seconds, seconds)
            self.passes += cells - self.cost
        self.passes = min(self.passes, LARGEST_CREDIT)


def automatic_positions_per_pass(rows: int, batch: int, length: int, dtype: torch.dtype, packed: bool) -> int:
    """The most positions of a pass for which `"auto"` may expect a gain; 1 except for one image with packed layers.

    In half precision it is 1, because the rounding of other products would decide between codes. With more images
    fewer rows are nearly free, and the image with the worst guess decides how far the window goes on.
    """
    exact = dtype in (torch.float32, torch.float64)
    return ROWS_AT_ONCE // rows if packed and exact and batch == 1 and length >= SHORTEST_GRID else 1
