"""How long functions take, in turns, how much memory they need, and what the machine could do at best."""

import contextlib
import gc
import importlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dnd_hf.ops.memory import kept_memory
from dnd_hf.training.throughput import synchronize


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def side_by_side(functions: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, run in turns `repeats` times, after one turn that does not count."""
    turns = [{name: timed(function, device) for name, function in functions.items()} for _ in range(repeats + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in functions}


def with_kept_memory(
    functions: dict[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """[`side_by_side`] for CPUs: "ours" with `kept_memory`, as our scripts have it, and the reference without and with.

    What has been kept once stays, so the reference without it is run first: give each section a process of its own.
    """
    others = {name: function for name, function in functions.items() if name != "ours"}
    as_it_is = side_by_side(others, device, repeats)
    with kept_memory():
        kept = side_by_side(functions, device, repeats)
    return {"": {**kept, **as_it_is}} | ({", both with kept memory": kept} if others else {})


def extra_memory(function: Callable[[], Any], device: torch.device) -> float:
    """The most memory, in MB (10^6 bytes), that a call needs above what is in use before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    page, done, most = os.sysconf("SC_PAGE_SIZE"), threading.Event(), 0
    with contextlib.suppress(AttributeError, OSError):  # of glibc: what is free goes back to the system first
        importlib.import_module("ctypes").CDLL(None).malloc_trim(0)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, resident())

    before, watcher = resident(), threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return max(0, most - before) / 1e6


def read_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second: of a sum over 512 MB on CPUs, of a copy (read and written) on GPUs."""
    block = torch.ones(2**27, device=device)
    if device.type == "cpu":
        return block.nbytes / median(side_by_side({"sum": block.sum}, device, repeats)["sum"])
    copy = torch.empty_like(block)
    return 2 * block.nbytes / median(side_by_side({"copy": lambda: copy.copy_(block)}, device, repeats)["copy"])


def row(section: str, what: str, unit: str, amount: float, seconds: dict[str, list[float]], **more: float) -> dict:
    """One line of the table: rates in `unit` per second, the ratio to the reference, the share of the floor."""
    middle = {name: median(values) for name, values in seconds.items()}
    line = {"section": section, "what": what, "unit": unit, "ours": amount / middle["ours"]}
    line["spread"] = (max(seconds["ours"]) - min(seconds["ours"])) / middle["ours"]
    if "reference" in middle:
        line["reference"] = amount / middle["reference"]
        line["ratio"] = middle["reference"] / middle["ours"]
    for floor in middle.keys() & {"floor", "packed_floor"}:
        line[f"times_{floor}"] = middle["ours"] / middle[floor]
    return line | more
