"""Evaluation mode for the time of a call, safe where calls on one model overlap (threads, calls inside callbacks)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

from torch import nn


@dataclass
class OpenCalls:
    """The calls that have a model in evaluation mode, and its modules that are to be in training mode again after."""

    count: int = 0
    trained: set[nn.Module] = field(default_factory=set)


OPEN_CALLS: dict[nn.Module, OpenCalls] = {}
OPEN_CALLS_LOCK = Lock()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Has every module of a model in evaluation mode; the last of overlapping calls to end restores what each was."""
    with OPEN_CALLS_LOCK:
        calls = OPEN_CALLS.setdefault(model, OpenCalls())
        calls.count += 1
        trained = {module for module in model.modules() if module.training}
        calls.trained |= trained
        for module in trained:
            module.training = False
    try:
        yield
    finally:
        with OPEN_CALLS_LOCK:
            calls.count -= 1
            if calls.count == 0:
                del OPEN_CALLS[model]
                for module in calls.trained:
                    module.training = True
