"""Several processes, on one machine or more: how a lost connection is told, and an end that cannot deadlock."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import PartialState


@contextmanager
def connected(advice: Callable[[], str]) -> Iterator[None]:
    """Says in plain words that another process, or its machine, is gone, and what to do then.

    Args:
        advice: gives the sentences that follow; called only where they are needed.

    Raises:
        RuntimeError: in the place of that of gloo or NCCL.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), flags=re.IGNORECASE)
        if PartialState().num_processes == 1 or not lost:
            raise
        raise RuntimeError(f"the connection to another process is lost; its own output says why. {advice()}") from error


def end_processes() -> None:
    """Ends the process group when all processes are here and gloo's thread has let go of its last tensors.

    The thread needs Python's lock for that, which the end of the group would hold while it waits for the thread.
    """
    state = PartialState()
    state.wait_for_everyone()
    if state.num_processes > 1:
        time.sleep(1)
    state.destroy_process_group()
