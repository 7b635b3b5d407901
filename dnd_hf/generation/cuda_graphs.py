"""Sampling steps as CUDA graphs: captured once, then each replayed by a single call, and kept for later calls."""

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from threading import Lock
from typing import cast

import torch
from torch import Tensor

from .decoders import StaticDecoder, one_a_row, static_runner
from .interface import ImageCodeModel
from .loop import SamplingLoop
from .settings import SamplingSettings


CAPTURE_LOCK = Lock()
"""One capture at a time in a process."""


class GraphedLoop(SamplingLoop):
    """A sampling loop whose steps are CUDA graphs, for all images of the batch until the last is complete.

    The first step that reads a new part of the cache runs as it is, and is captured after that. Passes that also read
    the condition or given codes are not captured, nor are shorter ones.

    Args:
        count: cells of a pass, where they are several.
        free: the loops of this kind that no call is using; `release` puts it there.
    """

    fixed_shapes = True

    def __init__(
        self,
        model: ImageCodeModel,
        batch: int,
        settings: SamplingSettings,
        device: torch.device,
        count: int,
        free: list["GraphedLoop"],
    ):
        with torch.inference_mode(False):  # its memory outlives the call
            runner = static_runner(model, 2 * batch if settings.guided else batch, device, count)
            super().__init__(model, runner, batch, settings, device)
            self.kept = torch.zeros_like(self.codes_BLD, dtype=torch.bool)
            self.images_B1 = torch.arange(batch, device=device)[:, None]
            self.places_B1 = torch.zeros_like(self.images_B1)
            self.cells = {width: self.images_B1.repeat(1, width) for width in {1, count}}
            """What a pass of so many cells reads on the device, `(batch, cells)`."""
        self.decoder, self.free = cast(StaticDecoder, runner.decoders[0]), free
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        """By how much of the cache is read, and the cells of a pass."""

    def keep(self, kept_BLD: Tensor | None) -> None:
        if kept_BLD is None:
            self.kept.fill_(False)
        else:
            self.kept.copy_(kept_BLD)
        self.kept_BLD = self.kept

    def run(self, first: int, cell: int, end: int) -> None:
        if first == 0:
            self.decoder.memory.zero_()  # what is masked must be finite; an earlier call may have left NaN
        if first == 0 or cell > first or end - first not in self.cells:
            self.decoder.position.fill_(self.position(first))
            super().run(first, cell, end)
        else:
            cells = [cell] * len(self.codes_BLD)
            self.run_apart(list(range(len(cells))), cells, cells, end - cell)

    def run_apart(self, images: list[int], starts: list[int], places: list[int], count: int) -> None:
        starts_B1 = one_a_row(starts, self.codes_BLD.device)
        positions_B1 = starts_B1 + self.position(1) - 1
        self.decoder.position.copy_(positions_B1.repeat(2, 1) if self.guided else positions_B1)
        if count not in self.cells:
            super().run_apart(images, starts, places, count)
            return
        cells_BN, last = self.cells[count], self.position(max(starts))
        cells_BN.copy_(starts_B1 + self.grid_L[:count])
        self.places_B1.copy_(one_a_row(places, self.codes_BLD.device))
        step = partial(self.sample_apart, self.images_B1, cells_BN, self.places_B1, last)
        graph = self.decoder.read_at(last + count - 1), count
        if graph in self.graphs:
            self.graphs[graph].replay()
        else:
            step()
            self.graphs[graph] = capture(step, self.graphs.values())

    def release(self) -> None:
        if self.codes_BLD.is_cuda:  # the next call may use another stream
            torch.cuda.current_stream(self.codes_BLD.device).synchronize()
        self.free.append(self)


def capture(function: Callable[[], None], others: Iterable[torch.cuda.CUDAGraph]) -> torch.cuda.CUDAGraph:
    """A graph of what `function` does, which is not run here, in the memory of others, never replayed at a time."""
    graph = torch.cuda.CUDAGraph()
    pool = next((other.pool() for other in others), None)
    # Other threads may use the device meanwhile.
    with CAPTURE_LOCK, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph


class KeptLoops:
    """The graphed loops of a model that no call is using. Copies of the model begin without any.

    A call takes a loop out and puts it back at its end, so that calls in other threads or in a callback have others.

    Args:
        weights: addresses of the weights that the graphs read.
    """

    def __init__(self, weights: tuple[int, ...] = ()):
        self.weights = weights
        self.free: dict[Hashable, list[GraphedLoop]] = {}

    def __reduce__(self):
        return KeptLoops, ()

    def take(
        self, model: ImageCodeModel, batch: int, condition_tokens: int, settings: SamplingSettings, count: int
    ) -> GraphedLoop:
        """A loop for `batch` images and passes of `count` cells, captured before or not."""
        filters = (settings.temperature, settings.top_k, settings.top_p) if settings.do_sample else None
        attention = model.config._attn_implementation
        key = (batch, condition_tokens, settings.guided, filters, attention, count)  # what is a constant in a graph
        free = self.free.setdefault(key, [])
        try:
            return free.pop()
        except IndexError:
            return GraphedLoop(model, batch, settings, model.device, count, free)
