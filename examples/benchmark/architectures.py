"""The suite architectures: DnD and RQ-Transformer of equal parameters, sampling and training, as the depth grows."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from decode import decoding_modes
from official import Reference
from official_rq_transformer import OriginalRQTransformer
from options import BenchmarkArguments
from timing import read_bandwidth, row, side_by_side
from torch import nn
from train_step import training_metrics, training_steps

from dnd_hf import DnDConfig, DnDForImageGeneration, RQTransformerConfig, RQTransformerForImageGeneration
from dnd_hf.generation.packed_decoder import packed_runner
from dnd_hf.ops.memory import kept_memory
from dnd_hf.training.throughput import peak_flops


def architectures(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """Both models at each of `architecture_depths`, without guidance: sampling codes, then a training step.

    The reference of each is its own official code.
    """
    original = OriginalRQTransformer(args.rq_reference) if args.rq_reference else None
    dtype = getattr(torch, args.dtype)
    for depth in args.architecture_depths:
        dnd, rq = make_pair(args, depth)
        for name, model in (("DnD", dnd), ("RQ-Transformer", rq)):
            count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
            what = f"{name}, {count:.0f}M, depth {depth}, {args.dtype}"
            model.to(device)
            authors = reference if model is dnd else original
            if "sampling" in args.architecture_jobs:
                yield from decode_rows(args, model, what, authors, dtype)
            if "training" in args.architecture_jobs:
                model.set_attn_implementation(args.attn_implementation)
                yield train_row(args, model.to(torch.float32), what, authors)


def make_pair(args: BenchmarkArguments, depth: int) -> tuple[DnDForImageGeneration, RQTransformerForImageGeneration]:
    """DnD of the size asked for, and the RQ-Transformer of the same width whose parameters are nearest.

    A quarter of its blocks are in the depth stack, as in the published 480M; it has one head for all depths.
    """
    torch.manual_seed(0)
    shared = dict(code_depth=depth, grid_size=args.grid_size, class_dropout_prob=0.0)
    dnd = DnDForImageGeneration(DnDConfig.from_size(args.size, **shared))
    for head in dnd.heads:
        nn.init.normal_(head.weight, std=0.02)
    width = dnd.config.hidden_size
    in_blocks = sum(p.numel() for p in dnd.parameters()) - (dnd.config.vocab_size + 1000 + 2 * 256) * width
    blocks = max(2, round(in_blocks / (12 * width**2)))
    depth_blocks = max(1, round(blocks / 4))
    config = RQTransformerConfig(
        hidden_size=width,
        num_attention_heads=dnd.config.num_attention_heads,
        num_hidden_layers=blocks - depth_blocks,
        num_depth_layers=depth_blocks,
        **shared,
    )
    return dnd, RQTransformerForImageGeneration(config)


def decode_rows(
    args: BenchmarkArguments,
    model: nn.Module,
    what: str,
    reference: Reference | OriginalRQTransformer | None,
    dtype: torch.dtype,
) -> Iterator[dict]:
    """Sampling codes; the official code at the same precision."""
    model.eval()
    sample_official = official_sampler(model.float(), reference, dtype) if reference else None
    model.to(dtype)
    model.cuda_graphs, model.cpu_kernels = decoding_modes(args, model.device)
    what += ", compiled kernels" * model.cpu_kernels
    for batch in args.decode_batch_sizes:
        labels = torch.arange(batch, device=model.device) % 1000
        functions = {"ours": partial(model.generate, labels, generator=torch.Generator(model.device).manual_seed(0))}
        functions["floor"] = decode_floor(model, batch, args.repeats)
        if sample_official:
            functions["reference"] = partial(sample_official, labels)
        seconds = side_by_side(functions, model.device, args.repeats)
        yield row("architectures", f"sampling, {what}, batch {batch}", "images/s", batch, seconds)


def official_sampler(model: nn.Module, reference, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that samples codes of labels by the official code, with the weights of ours."""
    config = model.config
    if isinstance(reference, Reference):
        official = reference.transformer(model).to(model.device, dtype)
        settings = dict(num_prediction_heads=config.code_depth, cfg_scale=1.0, top_k=0, sample_logits=True)
        return lambda labels: reference.generate(official, labels, config.sequence_length, **settings)
    original, vectors = reference.transformer(model)
    original.to(model.device, dtype)
    vectors.code_vectors = vectors.code_vectors.to(dtype)
    shape = (*config.grid_size, config.code_depth)

    def sample(labels: torch.Tensor) -> torch.Tensor:
        empty = torch.zeros(len(labels), *shape, dtype=torch.int64, device=labels.device)
        return original.sample(empty, vectors, cond=labels)

    return sample


def decode_floor(model: nn.Module, rows: int, repeats: int) -> Callable[[], None]:
    """A function that takes as long as the matrix products with weights must, as often as each is needed.

    On CPUs they are computed as `generate` computes them. On GPUs it waits for the larger of their bytes over the
    measured bandwidth and their operations over the measured matrix rate.
    """
    config, depth, cells = model.config, model.config.code_depth, model.config.sequence_length
    stacks = model.layer_stacks(model.device)
    times = [1, depth][: len(stacks)]
    if model.device.type == "cpu":
        runner = packed_runner(model, rows)
        products = [
            (product, torch.randn(rows, product.in_features, dtype=model.dtype), count)
            for decoder, count in zip(runner.decoders, times)
            for layer in decoder.layers
            for product in layer.products
        ]
        products += [(head, torch.randn(rows, config.hidden_size, dtype=model.dtype), 1) for head in runner.heads]

        def run() -> None:
            with torch.inference_mode():
                for _ in range(cells):
                    for product, values, count in products:
                        for _ in range(count):
                            product(values)

        return run
    used = sum(
        count * module.weight.numel()
        for stack, count in zip(stacks, times)
        for layer in stack.layers
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    )
    used += depth * model.heads[0].weight.numel()
    seconds = used * model.heads[0].weight.element_size() / read_bandwidth(model.device, repeats)
    seconds = cells * max(seconds, 2 * used * rows / peak_flops(model.device, model.dtype))
    return partial(time.sleep, seconds)


def train_row(
    args: BenchmarkArguments, model: nn.Module, what: str, reference: Reference | OriginalRQTransformer | None
) -> dict:
    """A training step, beside that of its official code, both with kept memory, as our scripts have it."""
    steps, batch = training_steps(args, model, reference), args.train_batch_size
    with kept_memory():
        seconds = side_by_side(steps, model.device, args.repeats)
    metrics = training_metrics(args, model, steps)(seconds)
    return row("architectures", f"training, {what}, batch {batch}", "images/s", batch, seconds, **metrics)
