"""kept_memory: new tensors in the place of freed ones, not in new pages of the system."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager


# Parameters of mallopt, from glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
KEPT = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 2**26}
# What glibc arrives at by itself once large blocks have been freed, and its other defaults
AS_BEFORE = {M_MMAP_MAX: 2**16, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26, M_TOP_PAD: 2**17}
CHOSEN_BY_USERS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@contextmanager
def kept_memory() -> Iterator[bool]:
    """Inside, glibc keeps what this process frees for its next tensors; yields whether it does.

    By default each block beyond 32 MB comes from the system when it is made and goes back when it is freed, and the
    system clears it, 4 kB at a time, when it is first written to. That can take longer than the arithmetic. The process
    then needs as much memory as it ever had in use, and a little more for gaps, also afterwards.

    Nothing changes with another C library, or where one of glibc's own variables (`CHOSEN_BY_USERS`) is set.
    """
    mallopt = _mallopt()
    for name, value in KEPT.items() if mallopt else ():
        mallopt(name, value)
    try:
        yield mallopt is not None
    finally:
        for name, value in AS_BEFORE.items() if mallopt else ():
            mallopt(name, value)


def _mallopt():
    """The function of glibc; None where it is not to be used."""
    if any(name in os.environ for name in CHOSEN_BY_USERS):
        return None
    try:
        library = ctypes.CDLL(None)
        return library.mallopt if library.gnu_get_libc_version else None
    except (AttributeError, OSError, TypeError):  # on other systems
        return None
