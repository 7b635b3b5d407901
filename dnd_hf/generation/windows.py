"""Which cells a pass samples: one by one, or several at a time with the same codes (exact parallel decoding).

The codes of a cell are a function of the codes before it and of the cell's own random numbers. So the codes of a window
of cells may be guessed and all be computed in one pass: those up to the first wrong guess had the right codes before
them, and are what one cell at a time gives. The window goes on behind them, with the others as new guesses. This is
Jacobi iteration with fixed noise (arXiv 2002.09928; speculative Jacobi decoding, arXiv 2410.01699). Each pass makes at
least one cell final, and only the sequential codes are a fixed point.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import median

import torch

from ..ops.number_checks import whole_number
from .loop import SamplingLoop
from .own_pace import OwnPace


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
TIMED_PASSES = 64
"""How many passes of each kind are remembered, the last ones."""
FIRST_COST = 1.5
"""What a pass of several cells is taken to take, in passes of one, before two have been timed."""
LEARNING = 0.25
"""The weight of the last image in the rate of a stretch."""
FORGETTING = 1.01
"""By how much a rate is taken to be higher, and a cost lower, with each image that does not measure it again."""


def checked_positions_per_pass(value: int | str, sequence_length: int) -> int | str:
    """The `positions_per_pass` of a call of `generate`; at most `sequence_length`.

    Raises:
        ValueError: it is neither `"auto"` nor a whole number of at least 1.
    """
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f'`positions_per_pass` must be "auto" or a whole number, got {value!r}.')
        return value
    return min(whole_number("positions_per_pass", value), sequence_length)


def several_cells_a_pass(
    loop: SamplingLoop, whole_L: Sequence[bool], width: int, rates: "WindowRates | None" = None
) -> Iterator[int]:
    """Samples the cells, up to `width` in a pass, and yields each when its codes are final.

    The images of a batch advance at their own pace; a cell is yielded when it is final in all of them. Where `width` or
    more cells in a row are left out, they wait for one another.

    Args:
        whole_L: the cells of which no code is to be sampled.
        rates: where passes of several cells pay, for `"auto"`; None: they are made everywhere.
    """
    cell, length, ends_L = 0, len(whole_L), ends_of_passes(whole_L, width)
    pace = OwnPace(loop)
    image = None if rates is None else AutomaticWindows(rates, length, LARGEST_LOSS * (length - sum(whole_L)))
    while cell < length:
        if whole_L[cell] and max(pace.places) <= cell:
            yield cell
            cell += 1
            continue
        end = ends_L[cell]
        left = end - 1 if loop.fixed_shapes and loop.unread == cell > 0 else end - cell
        count = min(width, left) if image is None or image.allows(cell) else 1
        started = time.thread_time()
        final = pace.step(cell, count, end)
        if image is not None:
            sampled = final - cell - sum(whole_L[cell:final])
            image.count(time.thread_time() - started, sampled, several=count > 1, full=count == width)
        yield from range(cell, final)
        cell = final
    if image is not None:
        image.end()


def ends_of_passes(whole_L: Sequence[bool], width: int) -> list[int]:
    """Of each cell, where the passes end that begin there: before the next `width` or more cells in a row that are left
    out, or at the end of the grid."""
    ends, end, run = [], len(whole_L), 0
    for cell in reversed(range(len(whole_L))):
        run = run + 1 if whole_L[cell] else 0
        if run >= width:
            end = cell
        ends.append(end)
    return ends[::-1]


@dataclass
class WindowRates:
    """What passes of several cells have brought and taken on a model, by its last images.

    The clock decides only how codes are computed, never which: `"auto"` is for precisions in which both ways give the
    same.
    """

    rates: list[float] = field(default_factory=lambda: [inf] * STRETCHES)
    """Cells that such a pass made final, for each stretch of the grid; infinite where none was made."""
    single_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED_PASSES))
    window_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED_PASSES))
    """What the last passes of one cell, and of several, took, without the first of these: it may prepare kernels."""
    prepared: bool = False
    """Whether there was that first one."""
    cost: float = FIRST_COST
    """What a pass of several cells takes, in passes of one."""


class AutomaticWindows:
    """Where one image takes passes of several cells: in stretches of the grid where they made more cells final than
    they took passes of one. A stretch that was never tried, or long ago, counts as one of these.

    Passes are compared by the medians of their CPU time in the calling thread, whatever else the machine is busy with.

    Args:
        model: what earlier images have told; this one adds to it.
        length: cells of the grid.
        budget: how many passes of one cell this image may lose in all. Only the first two passes of several of a model,
            of which nobody knows what they take, may lose more, and one of them after some dozens of images.
    """

    def __init__(self, model: WindowRates, length: int, budget: float):
        self.model, self.length, self.budget = model, length, budget
        self.passes = self.final = 0
        """Passes of several cells, and how many they have made final."""
        self.stretch, self.several, self.before = -1, False, (0, 0)

    def allows(self, cell: int) -> bool:
        """Whether the pass that begins at a cell may be of several. It makes one final at least."""
        model, stretch = self.model, cell * STRETCHES // self.length
        if stretch != self.stretch:
            self.leave_stretch()
            self.stretch, self.before = stretch, (self.passes, self.final)
            self.several = len(model.single_seconds) >= SINGLE_PASSES and model.rates[stretch] > model.cost
            if not self.several:
                model.rates[stretch] *= FORGETTING
        return self.several and (self.passes + 1) * model.cost - (self.final + 1) <= self.budget

    def count(self, seconds: float, cells: int, several: bool, full: bool = True) -> None:
        """Counts a pass that has sampled so many cells for good; `full`: it was as wide as others."""
        model = self.model
        if not several:
            model.single_seconds.append(seconds)
            return
        self.passes += 1
        self.final += cells
        if full and model.prepared:
            model.window_seconds.append(seconds)
            model.cost = median(model.window_seconds) / median(model.single_seconds)
        model.prepared = True

    def leave_stretch(self) -> None:
        """Takes over what the passes of the stretch have brought."""
        passes, final = self.before
        if self.passes > passes:
            rates, rate = self.model.rates, (self.final - final) / (self.passes - passes)
            before = rates[self.stretch]
            rates[self.stretch] = rate if before == inf else before + (rate - before) * LEARNING

    def end(self) -> None:
        """The image is complete. A cost that was not measured again may have been that of another moment."""
        self.leave_stretch()
        if not self.passes and self.model.cost > FIRST_COST:
            self.model.cost /= FORGETTING


def automatic_positions_per_pass(rows: int, batch: int, length: int, dtype: torch.dtype, packed: bool) -> int:
    """The most positions of a pass for which `"auto"` may expect a gain.

    It is 1 except for one or two images with packed layers. In half precision it is 1, because the rounding of other
    products would decide between codes. With more images there are rows enough without windows: more are not free.
    """
    exact = dtype in (torch.float32, torch.float64)
    return ROWS_AT_ONCE // rows if packed and exact and batch <= 2 and length >= SHORTEST_GRID else 1
