"""The suite train: a training step of the transformer."""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from decode import make_transformer
from official import Reference
from options import BenchmarkArguments
from timing import extra_memory, row, with_kept_memory
from torch import Tensor, nn

from dnd_hf.training.throughput import peak_flops, transformer_training_flops


def train(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """A training step: forward, backward, clipping, AdamW. MFU is its floor: operations over the measured rate."""
    dtype = getattr(torch, args.dtype)
    model = make_transformer(args, device, torch.float32).train()
    config, batch = model.config, args.train_batch_size
    labels = torch.arange(batch, device=device) % config.num_classes
    shape = (batch, *config.grid_size, config.code_depth)
    codes = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    flat = codes.flatten(1, 2)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def make_step(network: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(network.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
        return partial(step, network, optimizer, loss_of)

    functions = {"ours": make_step(model, lambda: model(labels, codes, labels=codes, output_logits=False).loss)}
    if reference:
        official = reference.transformer(model).to(device).train()
        functions["reference"] = make_step(
            official, lambda: official(idx=flat[:, :-1], cond_idx=labels, targets=flat)[1]
        )
        if args.torch_compile:
            official.compile()
    if args.torch_compile:
        model.compile()
    timings = with_kept_memory(functions, device, args.repeats)
    rate = peak_flops(device, dtype)
    memory_mb = {f"memory_mb_{name}": extra_memory(function, device) for name, function in functions.items()}
    what = f"{args.size}, depth {args.code_depth}, batch {batch}, {args.dtype}{', compiled' * args.torch_compile}"
    for memory, seconds in timings.items():
        mfu = batch * transformer_training_flops(config) / median(seconds["ours"]) / rate
        yield row("train", f"{what}{memory}", "images/s", batch, seconds, mfu=mfu, **memory_mb)
