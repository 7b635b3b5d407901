"""StopRequest: after Ctrl-C or SIGTERM a run finishes its step and writes a checkpoint."""

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_SECONDS = 2.0
"""A launcher passes Ctrl-C on to processes that have got it already: that is one request, not two."""


STEPS_BETWEEN_QUESTIONS = 10
"""Several processes ask one another this seldom, because accelerators wait for the answer."""


class StopRequest:
    """Inside, SIGINT and SIGTERM are noted; a second SIGINT, some seconds later, is a KeyboardInterrupt at once.

    Args:
        accelerator: whose processes are to stop together, whichever of them gets the signal.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.signal, self.received = accelerator, 0, 0.0
        self.earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self.earlier = {one: signal.signal(one, self._receive) for one in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for one, handler in self.earlier.items():
            signal.signal(one, handler)

    def agreed(self, step: int) -> int:
        """The signal that one of the processes has got, or 0; to be called by all after each step."""
        if self.accelerator.num_processes == 1:
            return self.signal
        if step % STEPS_BETWEEN_QUESTIONS:
            return 0
        received = torch.tensor([self.signal], device=self.accelerator.device)
        return int(self.accelerator.gather(received).max())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal and number == signal.SIGINT and now - self.received > REPEAT_SECONDS:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.received = number, now
            if self.accelerator.is_main_process:
                print(f"\n{signal.Signals(number).name}: stopping soon, with a checkpoint.", flush=True)


def ignore_stop_signals(worker: int) -> None:
    """For the workers of a DataLoader, which a terminal and a cluster signal too: their process tells them to end."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
