"""Which cells a pass samples: one by one, or several at a time with the same codes (exact parallel decoding).

The codes of a cell are a function of the codes before it and of the cell's own random numbers. So the codes of a window
of cells may be guessed and all be computed in one pass: those up to the first wrong guess had the right codes before
them, and are what one cell at a time gives. The window goes on behind them, with the others as new guesses. This is
Jacobi iteration with fixed noise (arXiv 2002.09928; speculative Jacobi decoding, arXiv 2410.01699). Each pass makes at
least one cell final, and only the sequential codes are a fixed point.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

import torch

from ..ops.number_checks import whole_number
from .loop import SamplingLoop


ROWS_AT_ONCE = 16
"""Rows (sequences x cells) of a pass that `"auto"` tries: on a CPU more rows take about as much longer as they gain."""
SHORTEST_GRID = 64
"""Cells that a grid must have for `"auto"` to try."""
LARGEST_LOSS = 0.03
"""By which share an image may become slower where `"auto"` tries."""
STRETCHES = 8
"""Parts of the grid, of equal length, for which `"auto"` decides one by one."""
SINGLE_PASSES = 4
"""Passes of one cell that are timed before the first of several."""
FORGETTING = 1.01
"""By how much the rate of a stretch is taken to be higher with each image that does not try it."""


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
    loop: SamplingLoop, whole_L: Sequence[bool], width: int, rates: "WindowRates | None" = None
) -> Iterator[int]:
    """The same with up to `width` cells a pass.

    The images of a batch go on together, by the cells that are final in all of them; each keeps its own guesses.

    Args:
        rates: where passes of several cells pay, for `"auto"`; None: they are made everywhere.
    """
    cell, length = 0, len(whole_L)
    image = None if rates is None else AutomaticWindows(rates, length, LARGEST_LOSS * (length - sum(whole_L)))
    while cell < length:
        if whole_L[cell]:
            yield cell
            cell += 1
            continue
        count = min(width, length - cell) if image is None or image.allows(cell) else 1
        started = time.thread_time()
        final = loop.step_window(cell, count)
        if image is not None:
            sampled = final - sum(whole_L[cell : cell + final])
            image.count(count, time.thread_time() - started, sampled, timed=count in (1, width))
        yield from range(cell, cell + final)
        cell += final
    if image is not None:
        image.leave_stretch()


@dataclass
class WindowRates:
    """What passes of several cells have brought and taken on a model so far.

    The fastest pass of each kind counts, in CPU time of the calling thread, whatever else the machine is busy with. The
    clock decides only how codes are computed, never which: `"auto"` is for precisions in which both ways give the same.
    """

    rates: list[float] = field(default_factory=lambda: [inf] * STRETCHES)
    """Cells that such a pass made final, for each stretch of the grid; infinite where none was made."""
    single_passes: int = 0
    single_seconds: float = inf
    window_seconds: float = inf

    @property
    def cost(self) -> float:
        """What a pass of several cells takes, in passes of one; before the first, a guess."""
        return self.window_seconds / self.single_seconds if self.window_seconds < inf else 2.0


class AutomaticWindows:
    """Where one image takes passes of several cells: in stretches of the grid where they made more cells final than
    they took passes of one. A stretch that was never tried, or long ago, counts as one of these.

    Args:
        rates: of the model, from earlier images; this one adds to them.
        length: cells of the grid.
        budget: how many passes of one cell this image may lose in all. Only the first pass of several that a model
            ever makes, of which nobody knows what it takes, may lose more.
    """

    def __init__(self, rates: WindowRates, length: int, budget: float):
        self.model, self.length, self.budget, self.lost = rates, length, budget, 0.0
        self.stretch, self.several, self.passes, self.cells = -1, False, 0, 0

    def allows(self, cell: int) -> bool:
        """Whether the pass that begins at a cell may be of several. It makes one final at least."""
        stretch = cell * STRETCHES // self.length
        if stretch != self.stretch:
            self.leave_stretch()
            self.stretch, self.passes, self.cells = stretch, 0, 0
            model = self.model
            self.several = model.single_passes >= SINGLE_PASSES and model.rates[stretch] > model.cost
            if not self.several:
                model.rates[stretch] *= FORGETTING
        return self.several and self.lost + self.model.cost - 1 <= self.budget

    def leave_stretch(self) -> None:
        """Takes over what the passes of the stretch have brought."""
        if self.passes:
            before, rate = self.model.rates[self.stretch], self.cells / self.passes
            self.model.rates[self.stretch] = rate if before == inf else (before + rate) / 2

    def count(self, count: int, seconds: float, cells: int, timed: bool) -> None:
        """Counts a pass of `count` cells that has sampled so many for good; `timed`: its time may be compared."""
        model = self.model
        if count == 1:
            model.single_passes += 1
            model.single_seconds = min(model.single_seconds, seconds)
            return
        if timed:
            model.window_seconds = min(model.window_seconds, seconds)
        self.passes += 1
        self.cells += cells
        self.lost += model.cost - cells


def automatic_positions_per_pass(rows: int, batch: int, length: int, dtype: torch.dtype, packed: bool) -> int:
    """The most positions of a pass for which `"auto"` may expect a gain; 1 except for one image with packed layers.

    In half precision it is 1, because the rounding of other products would decide between codes. With more images
    fewer rows are nearly free, and the image with the worst guess decides how far the window goes on.
    """
    exact = dtype in (torch.float32, torch.float64)
    return ROWS_AT_ONCE // rows if packed and exact and batch == 1 and length >= SHORTEST_GRID else 1
