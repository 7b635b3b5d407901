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
"""Cells that a grid must have for `"auto"` to try, since trying has its price."""
SINGLE_PASSES = 4
"""Passes of one cell that are timed first."""
TRIED_PASSES = 2
"""Passes of several cells that are made before they are judged; the first may have to prepare its kernels."""
LARGEST_LOSS = 0.015
"""What wrong guesses may cost, as a share of the passes that one cell at a time takes."""


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
    loop: SamplingLoop, whole_L: Sequence[bool], width: int, profit: "Profit | None" = None
) -> Iterator[int]:
    """The same with up to `width` cells a pass.

    The images of a batch go on together, by the cells that are final in all of them; each keeps its own guesses.

    Args:
        profit: says when passes of several cells do not pay; None: they are made anyway.
    """
    cell, length = 0, len(whole_L)
    while cell < length:
        if whole_L[cell]:
            yield cell
            cell += 1
            continue
        count = min(width, length - cell) if profit is None or profit.expected else 1
        started = time.perf_counter()
        final = loop.step_window(cell, count)
        if profit is not None:
            sampled = final - sum(whole_L[cell : cell + final])
            profit.count(count == 1, time.perf_counter() - started, sampled)
        yield from range(cell, cell + final)
        cell += final


@dataclass
class Profit:
    """Whether passes of several cells pay, from what they took and what they brought.

    The fastest pass of each kind counts, as others may have waited for something else. The clock decides only how
    codes are computed, never which: `"auto"` is for precisions in which both ways give the same.

    Args:
        largest_loss: how many passes of one cell may be lost.
    """

    largest_loss: float
    single_passes: int = 0
    passes: int = 0
    cells: int = 0
    single_seconds: float = float("inf")
    seconds: float = float("inf")

    def count(self, single: bool, seconds: float, cells: int) -> None:
        """Counts a pass, and the cells that it sampled."""
        if single:
            self.single_passes += 1
            self.single_seconds = min(self.single_seconds, seconds)
        else:
            self.passes += 1
            self.cells += cells
            self.seconds = min(self.seconds, seconds)

    @property
    def expected(self) -> bool:
        """Whether the next pass should be of several cells."""
        if self.single_passes < SINGLE_PASSES:
            return False
        if self.passes < TRIED_PASSES:
            return True
        return self.passes * max(1, self.seconds / self.single_seconds) - self.cells <= self.largest_loss


def automatic_positions_per_pass(rows: int, batch: int, length: int, dtype: torch.dtype, packed: bool) -> int:
    """The most positions of a pass for which `"auto"` may expect a gain; 1 except for one image with packed layers.

    In half precision it is 1, because the rounding of other products would decide between codes. With more images
    fewer rows are nearly free, and the image with the worst guess decides how far the window goes on.
    """
    exact = dtype in (torch.float32, torch.float64)
    return ROWS_AT_ONCE // rows if packed and exact and batch == 1 and length >= SHORTEST_GRID else 1
