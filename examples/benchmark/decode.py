"""The suites decode and growth: sampling codes from labels, beside the official code and beside the floor."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from official import Reference
from options import BenchmarkArguments
from timing import extra_memory, read_bandwidth, row, side_by_side, timed
from torch import Tensor, nn

from dnd_hf import DnDConfig, DnDForImageGeneration
from dnd_hf.generation.loop import SamplingLoop
from dnd_hf.generation.packed_decoder import packed_runner
from dnd_hf.ops.cpu_precision import has_instructions
from dnd_hf.training.throughput import peak_flops


def decode(
    args: BenchmarkArguments, device: torch.device, reference: Reference | None, more: bool = True
) -> Iterator[dict]:
    """Sampling codes from labels, with guidance; the official code at the better of its two precisions on CPUs that
    have instructions for both.

    A row for each of `positions_per_pass`. `more`: also the time of the first call, the memory, the passes and the time
    to the codes of the first row of the grid, which take calls of their own.
    """
    dtype = getattr(torch, args.dtype)
    model = make_transformer(args, device, torch.float32)
    officials = {}
    if reference:
        precisions = (torch.float32, torch.bfloat16) if device.type == "cpu" else (dtype,)
        officials = {
            precision: reference.transformer(model).to(device, precision)
            for precision in precisions
            if has_instructions(device, precision)
        }
    model.to(dtype)
    model.cuda_graphs, model.cpu_kernels = decoding_modes(args, device)
    if args.torch_compile:
        model.compile_repeated_blocks()
    for batch in args.decode_batch_sizes:
        labels = torch.arange(batch, device=device) % model.config.num_classes
        options = dict(guidance_scale=args.guidance_scale, generator=0)
        widths = {width: partial(model.generate, labels, positions_per_pass=width, **options) for width in args.widths}
        first = next(iter(widths.values()))
        once = {"first_call_s": timed(first, device)} if more else {}
        guided = 2 if args.guidance_scale != 1 else 1
        functions = {str(width): function for width, function in widths.items()}
        functions |= decode_floors(model, guided * batch, args.repeats)
        for precision, official in officials.items():
            functions[str(precision)] = partial(
                reference.generate, official, labels, model.config.sequence_length,
                num_prediction_heads=args.code_depth, cfg_scale=args.guidance_scale, top_k=0, sample_logits=True,
            )  # fmt: skip
        seconds = side_by_side(functions, device, args.repeats)
        if officials:
            times = [seconds.pop(str(precision)) for precision in officials]
            seconds["reference"] = min(times, key=median)
        what = f"{args.size}, depth {args.code_depth}, batch {batch}, guidance {args.guidance_scale:g}, {args.dtype}"
        what += ", compiled kernels" * model.cpu_kernels
        if more:
            once["memory_mb"] = extra_memory(first, device)
        ours = {width: seconds.pop(str(width)) for width in widths}
        for width, generate in widths.items():
            if more:
                once |= passes_and_first_row(generate, model.config.grid_size[1], device)
            several = f", {width} per pass" if width != 1 else ""
            yield row("decode", what + several, "images/s", batch, {"ours": ours[width], **seconds}, **once)


def decoding_modes(args: BenchmarkArguments, device: torch.device) -> tuple[bool, bool]:
    """What `cuda_graphs` and `cpu_kernels` of a model are to be on a device."""
    return args.cuda_graphs and device.type == "cuda", args.cpu_kernels and device.type == "cpu"


def passes_and_first_row(generate: Callable, columns: int, device: torch.device) -> dict[str, float]:
    """How many passes a call makes, and seconds to the codes of the first row of the grid."""
    with counted_passes() as passes:
        generate()
    first_row = partial(generate, callback=lambda cell, codes: cell == columns - 1)
    return {"passes": len(passes), "first_row_s": timed(first_row, device)}


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """A list that grows by the sampled positions of each pass of a model, in all calls meanwhile."""
    passes, steps = [], (SamplingLoop.step, SamplingLoop.step_apart)

    def counted_step(loop: SamplingLoop, cell: int, count: int = 1) -> None:
        passes.append(count)
        steps[0](loop, cell, count)

    def counted_step_apart(loop: SamplingLoop, *images_starts_places: list[int], count: int) -> None:
        passes.append(count)
        steps[1](loop, *images_starts_places, count)

    SamplingLoop.step, SamplingLoop.step_apart = counted_step, counted_step_apart
    try:
        yield passes
    finally:
        SamplingLoop.step, SamplingLoop.step_apart = steps


def growth(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """Decoding, without the official code, against the batch, the grid and the depth."""
    sweeps = {
        "batch": (args.growth_batch_sizes, lambda batch: dict(decode_batch_sizes=[batch])),
        "grid": (args.growth_grid_sizes, lambda grid: dict(decode_batch_sizes=[1], grid_size=grid)),
        "depth": (args.growth_depths, lambda depth: dict(decode_batch_sizes=[1], code_depth=depth)),
    }
    for kind, (values, settings) in sweeps.items():
        for value in values:
            for line in decode(replace(args, **settings(value)), device, None, more=False):
                yield line | {"section": "growth", "against": kind, "value": value}


def decode_floors(model: DnDForImageGeneration, sequences: int, repeats: int) -> dict[str, Callable[[], None]]:
    """Functions that take as long as decoding must.

    On CPUs: the matrix products of all steps, with the model's own weights, and then the time of reading the part of
    the cache that is filled, at the measured bandwidth; in `floor` by PyTorch's linear layers, in `packed_floor` as
    `generate` multiplies, which is faster. On GPUs: the larger of bytes (weights and cache) over the measured bandwidth
    and operations over the measured matrix rate.
    """
    config, device, dtype = model.config, model.device, model.dtype
    steps = config.sequence_length
    layers = config.prediction_layers[-1] + 1
    item = torch.finfo(dtype).bits // 8
    entries = 2 * layers * sequences * config.num_key_value_heads * config.head_dim
    cache_bytes = item * entries * steps * (steps + 1) / 2
    weights = [m.weight for layer in model.layers[:layers] for m in layer.modules() if isinstance(m, nn.Linear)]
    weights += [model.head(k).weight for k in range(config.code_depth)]
    bandwidth = read_bandwidth(device, repeats)
    if device.type == "cpu":
        inputs = {weight.shape[1]: torch.randn(sequences, weight.shape[1], dtype=dtype) for weight in weights}
        plain = [(inputs[weight.shape[1]], partial(F.linear, weight=weight)) for weight in weights]
        runner = packed_runner(model, sequences)
        products = [*runner.heads, *(product for layer in runner.decoders[0].layers for product in layer.products)]
        packed = [(inputs[product.in_features], product) for product in products]

        def run(products: list[tuple[Tensor, Callable]]) -> None:
            with torch.inference_mode():
                for _ in range(steps):
                    for values, product in products:
                        product(values)
            time.sleep(cache_bytes / bandwidth)

        return {"floor": partial(run, plain), "packed_floor": partial(run, packed)}
    weight_count = sum(weight.numel() for weight in weights)
    by_memory = (steps * weight_count * item + cache_bytes) / bandwidth
    by_arithmetic = 2 * steps * weight_count * sequences / peak_flops(device, dtype)
    return {"floor": partial(time.sleep, max(by_memory, by_arithmetic))}


def make_transformer(args: BenchmarkArguments, device: torch.device, dtype: torch.dtype) -> DnDForImageGeneration:
    """A transformer of the size asked for, with random weights in its heads too."""
    torch.manual_seed(0)
    config = DnDConfig.from_size(args.size, code_depth=args.code_depth, grid_size=args.grid_size)
    model = DnDForImageGeneration(config)
    for head in model.heads:
        nn.init.normal_(head.weight, std=0.02)
    return model.to(device, dtype)
