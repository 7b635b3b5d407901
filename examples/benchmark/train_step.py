"""The suite train: a training step of the transformer, and what the suite architectures shares of it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from decode import make_transformer
from official import Loss, Reference
from official_rq_transformer import OriginalRQTransformer
from options import BenchmarkArguments
from timing import extra_memory, row, with_kept_memory
from torch import Tensor, nn

from dnd_hf import DnDForImageGeneration, RQTransformerForImageGeneration
from dnd_hf.training.throughput import peak_flops, transformer_training_flops


def train(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """A training step of DnD, with the memory that both keep and without."""
    model = make_transformer(args, device, torch.float32)
    steps = training_steps(args, model, reference)
    timings = with_kept_memory(steps, device, args.repeats)
    metrics = training_metrics(args, model, steps)
    batch, compiled = args.train_batch_size, ", compiled" * args.torch_compile
    what = f"{args.size}, depth {args.code_depth}, batch {batch}, {args.dtype}{compiled}"
    for memory, seconds in timings.items():
        yield row("train", f"{what}{memory}", "images/s", batch, seconds, **metrics(seconds))


def training_steps(
    args: BenchmarkArguments,
    model: DnDForImageGeneration | RQTransformerForImageGeneration,
    reference: Reference | OriginalRQTransformer | None,
) -> dict[str, Callable[[], None]]:
    """Functions that make a training step: forward, backward, clipping, AdamW.

    "ours" of `model`, and "reference" of the official code from the same weights, with its own loss, on the same labels
    and codes, at the same precision, with an optimizer of the same settings.

    Raises:
        RuntimeError: the losses of the two are not the same.
    """
    config, device, dtype = model.config, model.device, getattr(torch, args.dtype)
    labels = torch.arange(args.train_batch_size, device=device) % config.num_classes
    shape = (args.train_batch_size, *config.grid_size, config.code_depth)
    codes = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def loss_of_ours(labels: Tensor, codes: Tensor) -> Tensor:
        return model(labels, codes, labels=codes, output_logits=False).loss

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Loss) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(labels, codes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    networks: dict[str, tuple[nn.Module, Loss]] = {"ours": (model, loss_of_ours)}
    if reference:
        networks["reference"] = reference.training_loss(model)
        check_same_loss(model, loss_of_ours, *networks["reference"], labels[:1], codes[:1])
    steps = {}
    for name, (network, loss_of) in networks.items():
        if args.torch_compile:
            network.compile()
        network.train()
        optimizer = torch.optim.AdamW(network.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
        steps[name] = partial(step, network, optimizer, loss_of)
    return steps


def check_same_loss(
    model: nn.Module,
    loss_of_ours: Loss,
    official: nn.Module,
    loss_of_official: Loss,
    labels: Tensor,
    codes: Tensor,
) -> None:
    """Raises RuntimeError where the losses of two models, without dropout, differ by more than 1e-6 of them."""
    model.eval()
    with torch.no_grad(), without_dropout(official):
        losses = [loss_of(labels, codes).item() for loss_of in (loss_of_ours, loss_of_official)]
    if not math.isclose(*losses, rel_tol=1e-6):
        raise RuntimeError(f"ours and the official code have different losses: {losses[0]} and {losses[1]}.")


@contextmanager
def without_dropout(official: nn.Module) -> Iterator[None]:
    """Inside, the official code drops neither activations nor labels, in training mode, which its loss needs."""
    names = ("p", "dropout_prob")  # of nn.Dropout, of its LabelEmbedder
    before = [(one, name, getattr(one, name)) for one in official.modules() for name in names if hasattr(one, name)]
    for module, name, _ in before:
        setattr(module, name, 0.0)
    official.train()
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def training_metrics(
    args: BenchmarkArguments,
    model: DnDForImageGeneration | RQTransformerForImageGeneration,
    steps: dict[str, Callable[[], None]],
) -> Callable[[dict[str, list[float]]], dict[str, float]]:
    """What makes of the seconds of `steps` further columns: the memory of each, and MFU.

    MFU is the floor of a training step: its operations over the measured rate of matrix products, over its time.
    """
    memory = {f"memory_mb_{name}": extra_memory(step, model.device) for name, step in steps.items()}
    operations = args.train_batch_size * transformer_training_flops(model.config)
    floor = operations / peak_flops(model.device, getattr(torch, args.dtype))
    return lambda seconds: {"mfu": floor / median(seconds["ours"]), **memory}
