"""How messages are worded and printed: numbers with their nouns, and lines of their own beside progress bars."""

import logging
import sys

from torch.utils.data import get_worker_info
from tqdm.auto import tqdm


def counted(number: int, noun: str) -> str:
    """`1 image`, `1,000 images`, `2 classes`."""
    plural = noun if number == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {plural}"


class BesideProgressBars(logging.Handler):
    """Writes messages to stderr, each on a line of its own, also while a progress bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if get_worker_info() is None:
            tqdm.write(text, file=sys.stderr)
        else:  # of a DataLoader, whose bar is another process's
            sys.stderr.write(f"\n{text}\n")


def close_progress_bars() -> None:
    """Ends the lines of progress bars that an error has left open."""
    for bar in list(tqdm._instances):
        bar.close()
