"""Sampling steps as CUDA graphs: captured once, then each replayed by a single call, and kept for later calls."""

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from threading import Lock
from typing import cast

import torch
from torch import Tensor

from .decoders import StaticDecoder, static_runner
from .interface import ImageCodeModel
from .loop import SamplingLoop
from .settings import SamplingSettings


CAPTURE_LOCK = Lock()
"""One capture at a time in a process."""


class GraphedLoop(SamplingLoop):
    """A sampling loop whose steps are CUDA graphs.

    The first step that reads a new part of the cache runs as it is, and is captured after that. Passes that also read
    the condition or given codes are not captured, nor are the shorter ones at the end of the grid.

    Args:
        count: cells of a pass, where they are several.
        free: the loops of this kind that no call is using; `release` puts it there.
    """

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
            self.static_cells = {width: torch.arange(width, device=device) for width in {1, count}}
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
        position, count = self.position(first), end - first
        self.decoder.position.fill_(position)
        if first == 0 or cell > first or count not in self.static_cells:
            super().run(first, cell, end)
            return
        cells = self.static_cells[count]
        cells += cell - cells[0]
        step = partial(self.sample, cells, cells, first)
        graph = self.decoder.read_at(position + count - 1), count
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
