"""The suite memory: sampling with the weights there once, packed, in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from official import Reference
from options import BenchmarkArguments
from timing import timed

from dnd_hf import DnDConfig, DnDForImageGeneration


def memory(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """One image after `pack_for_cpu`: the most memory that the process ever had, and what of it the model is to blame
    for, over that of the weights. Only for CPUs, and Linux: elsewhere no row."""
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    run = subprocess.run(
        [sys.executable, __file__, json.dumps(asdict(args))], stdout=subprocess.PIPE, text=True, check=True
    )
    yield json.loads(run.stdout.splitlines()[-1])


def resident(name: str) -> float:
    """MB (10^6 bytes) of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def sample_once(args: BenchmarkArguments) -> dict:
    """Makes a model with random weights, each of them once, packs it, and samples an image."""
    config = DnDConfig.from_size(args.size, code_depth=args.code_depth, grid_size=args.grid_size)
    before = resident("VmRSS")
    with torch.device("meta"):
        model = DnDForImageGeneration(config).to(getattr(torch, args.dtype)).eval()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data.uniform_(-0.03, 0.03) if weight.ndim > 1 else weight.data.fill_(1)
    weights = sum(weight.nbytes for weight in model.parameters()) / 1e6
    device, model.cpu_kernels = torch.device("cpu"), args.cpu_kernels
    packing = timed(model.pack_for_cpu, device)
    seconds = timed(lambda: model.generate([0], guidance_scale=args.guidance_scale, generator=0), device)
    what = f"{args.size}, {model.num_parameters() / 1e6:.0f}M, batch 1, guidance {args.guidance_scale:g}, {args.dtype}"
    what += ", compiled kernels" * model.cpu_kernels
    peak = resident("VmHWM")
    return {
        "section": "memory",
        "what": what,
        "unit": "images/s",
        "ours": 1 / seconds,
        "weights_mb": weights,
        "peak_mb": peak,
        "peak_over_weights": (peak - before) / weights,
        "packing_s": packing,
    }


if __name__ == "__main__":
    print(json.dumps(sample_once(BenchmarkArguments(**json.loads(sys.argv[1])))))
