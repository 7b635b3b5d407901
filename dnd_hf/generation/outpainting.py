"""Outpainting: grids larger than the model's own, by windows of its size that overlap."""

from collections.abc import Callable, Sequence

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ..ops.number_checks import whole_number
from ..ops.overlapping_windows import window_corners
from .given_codes import checked_given_codes
from .inpainting import InpaintingMixin
from .noise import checked_generators


class OutpaintingMixin(InpaintingMixin):
    """Adds `outpaint` to a model that has what [`ImageCodeModel`] says."""

    @torch.no_grad()
    @apply_forward_hook
    def outpaint(
        self,
        class_labels: Tensor | Sequence[int] | int,
        grid_size: tuple[int, int],
        overlap: int | tuple[int, int] | None = None,
        codes: Tensor | None = None,
        codes_mask: Tensor | None = None,
        num_particles: int = 1,
        generator: torch.Generator | int | Sequence[torch.Generator | int] | None = None,
        callback: Callable[[int, Tensor], bool | None] | None = None,
        **settings,
    ) -> Tensor:
        """Samples the codes of grids that are larger than the model's, one per label.

        A window of the model's size moves over the grid, from left to right and then down ([`window_corners`]). Each
        code has the model's distribution given the codes of its window that come before it in raster order, be they
        given or made by an earlier window; what is outside of the window it does not see. So a window of the first row
        is an image as the model makes it, and the first of all is the one that `generate` makes with these generators.

        The codes that a window takes over cost no pass of their own: an image costs one pass for each cell of the
        grid. A `guidance_schedule` begins anew with each window.

        Args:
            class_labels, generator: as in `generate`; a generator draws for all windows, one after the other.
            grid_size: (height, width) in cells; each at least the model's.
            overlap: by how many cells a window overlaps with those above and to the left of it, at least; one number,
                or (rows, columns). Each at least 1 and less than the model's grid has; `None`: half of the grid.
            codes, codes_mask: as in `generate`, but of the whole grid.
            num_particles: continuations of each window, weighted by what they say of the codes that stay and come
                after them, see [`InpaintingMixin.inpaint`]: given ones, and those of the cells to the left, further
                down. An image costs as much as so many. 1: each code is sampled from what comes before it, and no more.
            callback: called after each cell as its first window passes over it, with the number of cells before and the
                codes so far, `(batch, height, width, depth)`: to keep them, copy them. Where it returns True, sampling
                ends; the codes that are not made then are 0.
            settings: further arguments of `generate`, by name; with particles those of `inpaint`.

        Returns:
            `(batch, height, width, depth)` int64 in `[0, vocab_size)`.

        Raises:
            ValueError: an argument out of its range; nothing has been computed then. Or, at the end of a window: the
                logits were not finite numbers.
        """
        config = self.config
        corners = window_corners(grid_size, tuple(config.grid_size), overlap)
        num_particles = whole_number("num_particles", num_particles)
        conditions_BT = self.check_conditions(class_labels)
        shape = (len(conditions_BT), *grid_size, config.code_depth)
        given = checked_given_codes(codes, codes_mask, shape, config.vocab_size, conditions_BT.device)
        settings["generator"] = checked_generators(generator, len(conditions_BT))
        if given is None:
            made = torch.zeros(shape, dtype=torch.int64, device=conditions_BT.device)
            known = torch.zeros_like(made, dtype=torch.bool)
        else:
            made, known = given.codes_BLD.view(shape), given.mask_BLD.view(shape).clone()

        rows, columns = config.grid_size
        progress = Progress(made, callback)
        for top, left in corners:
            window = (slice(None), slice(top, top + rows), slice(left, left + columns))
            options = dict(codes=made[window], codes_mask=known[window], callback=progress.of(window), **settings)
            if num_particles > 1:
                made[window] = self.inpaint(class_labels, num_particles=num_particles, **options)
            else:
                made[window] = self.generate(class_labels, **options)
            if progress.stopped:
                break
            known[window] = True
        return made

    def outpaint_log_probs(
        self,
        class_labels: Tensor | Sequence[int] | int | None,
        codes: Tensor,
        overlap: int | tuple[int, int] | None = None,
    ) -> Tensor:
        """The log-probability, in nats, with which `outpaint` makes each code (temperature 1, no filters, no guidance).

        Args:
            class_labels: as in `score`; None: the null class.
            codes: `(batch, height, width, depth)` of a grid of at least the model's size.
            overlap: as in `outpaint`.

        Returns:
            `(batch, height, width, depth)` float32; a code counts in the first window that has its cell.

        Raises:
            ValueError: an argument of another shape or type, or out of its range.
        """
        rows, columns = self.config.grid_size
        _, height, width, _ = codes.shape
        log_probs = torch.zeros(codes.shape, dtype=torch.float32, device=codes.device)
        # The last windows first: where windows overlap, the earlier one overwrites what a later one says.
        for top, left in reversed(window_corners((height, width), (rows, columns), overlap)):
            window = (slice(None), slice(top, top + rows), slice(left, left + columns))
            log_probs[window] = self.score(class_labels, codes[window]).log_probs
        return log_probs


class Progress:
    """Tells a callback of a whole grid what those of its windows are told.

    Args:
        made: the codes of the grid, `(batch, height, width, depth)`; those of a window are put into it.
        callback: called with the number of cells before, and with `made`.
    """

    def __init__(self, made: Tensor, callback: Callable[[int, Tensor], bool | None] | None):
        self.made, self.callback = made, callback
        self.passed = torch.zeros(made.shape[1:3], dtype=torch.bool)
        self.step, self.stopped = 0, False

    def of(self, window: tuple[slice, slice, slice]) -> Callable[[int, Tensor], bool] | None:
        """The callback of a window; the next window's is to be made when this one is at its end."""
        callback = self.callback
        if callback is None:
            return None
        counted = self.passed[window[1:]].flatten().tolist()
        self.passed[window[1:]] = True

        def on_cell(cell: int, codes: Tensor) -> bool:
            if not counted[cell]:
                self.made[window] = codes
                self.stopped = callback(self.step, self.made) is True
                self.step += 1
            return self.stopped

        return on_cell
