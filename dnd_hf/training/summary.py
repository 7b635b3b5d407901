"""What a training run says before it starts: data, model, device, steps, and where it writes."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ..arguments import RunArguments
from ..messages import counted
from .environment import RunEnvironment


def with_steps(args: RunArguments, num_samples: int, samples_per_step: int) -> RunArguments:
    """The options with `num_train_epochs`, passes over `num_samples`, turned into `max_train_steps`."""
    if args.num_train_epochs is None:
        return args
    steps = max(1, math.ceil(args.num_train_epochs * num_samples / samples_per_step))
    return replace(args, max_train_steps=steps, num_train_epochs=None)


def run_summary(environment: RunEnvironment, args: RunArguments, model: nn.Module, num_samples: int) -> dict[str, str]:
    """What a run is about to do, by topic.

    Args:
        environment: devices and checkpoint.
        args: options, with `max_train_steps` as it will be.
        model: what is trained.
        num_samples: length of the training data.
    """
    accelerator, samples_per_step = environment.accelerator, environment.samples_per_step
    parameters = list(model.parameters())
    count, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    epochs = args.max_train_steps * samples_per_step / num_samples
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    accumulated = args.gradient_accumulation_steps
    source = getattr(args, "codes_dir", None) or args.dataset_name
    held_out = f"{counted(args.num_validation_images, 'image')} held out"
    if args.num_validation_images > num_samples / 4:
        held_out += ": a large share; `num_validation_images` sets it"
    return {
        "model": f"{type(model).__name__}, {count:,} parameters"
        + (f", {trained:,} trained" if trained < count else ""),
        "data": f"{source}: {counted(num_samples, 'sample')} to train on, {held_out}",
        "device": f"{_device(accelerator.device)}, {precision}",
        "steps": f"{environment.first_step:,} to {args.max_train_steps:,}, epochs in all: {epochs:,.2f}",
        "batch": f"{counted(samples_per_step, 'sample')} a step: {args.train_batch_size} x {accumulated} accumulated x"
        f" {counted(accelerator.num_processes, 'process')}",
        "output": f"{args.output_dir}; checkpoints every {args.checkpointing_steps:,} steps, validation every"
        f" {args.validation_steps:,}",
    }


def as_text(summary: Mapping[str, str]) -> str:
    """A line for each topic."""
    width = max(map(len, summary))
    return "\n".join(f"{topic:<{width}}  {text}" for topic, text in summary.items())


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Metrics in a line, those of several depths in a row: "psnr 21.3, l2 by depth 0.04 0.03"."""
    groups: dict[str, list[str]] = {}
    for name, value in metrics.items():
        groups.setdefault(name.partition("_depth_")[0] + " by depth" * ("_depth_" in name), []).append(f"{value:.4g}")
    return ", ".join(f"{name} {' '.join(values)}" for name, values in groups.items())


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else device.type
