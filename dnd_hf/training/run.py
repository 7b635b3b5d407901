"""TrainingRun: the loop around a training step, with its schedule, averaged weights, validation and checkpoints."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import get_scheduler

from .arguments import TrainingArguments
from .checkpoints import find_checkpoint, list_checkpoints, save_checkpoint
from .data_order import TrainingStream, mixed_seed
from .optimization import averaged_weights
from .reports import JsonlTracker, plot_training_curves


class TrainingRun:
    """One training run, new or resumed: `prepare` the model, `resume`, then `loop`.

    The result depends on the arguments and the number of processes alone, not on where the run was interrupted: every
    forward pass has its own seed, and the data order is a [`TrainingStream`].

    Args:
        args: how the run goes.

    Raises:
        ValueError: no such checkpoint, or `output_dir` holds another run's.
    """

    def __init__(self, args: TrainingArguments):
        self.args, self.output_dir = args, Path(args.output_dir)
        self.first_step, self.checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        if args.resume_from_checkpoint is None and list_checkpoints(args.output_dir):
            raise ValueError(
                f"{args.output_dir} holds checkpoints: give another --output_dir, or --resume_from_checkpoint latest."
            )
        mixed_precision = args.mixed_precision
        if mixed_precision is None and "ACCELERATE_MIXED_PRECISION" not in os.environ:
            has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            mixed_precision = "bf16" if has_bf16 else "no"
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=[JsonlTracker(self.output_dir / "metrics.jsonl", self.first_step), *args.report_to],
            project_dir=args.output_dir,
            # The quantizer keeps its codebooks equal over the processes itself.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError("train in bf16 or float32: fp16 is too narrow for the quantizer and the GAN's weight.")

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Prepares the trained model, its optimizer and learning rate schedule, and averages its weights."""
        args = self.args
        self.model = model
        self.scheduler = get_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps)
        prepared = self.accelerator.prepare(model, optimizer)
        self.ema = EMAModel(model.parameters(), args.ema_decay)
        self.accelerator.register_for_checkpointing(self.scheduler, self.ema)
        return prepared

    def resume(self) -> None:
        """Loads the checkpoint, if there is one, into everything prepared so far."""
        if self.checkpoint is not None:
            self.accelerator.load_state(str(self.checkpoint))
            self.ema.to(self.accelerator.device)

    def loop(
        self,
        dataset: Dataset,
        collate: Callable,
        train_step: Callable[[dict[str, Tensor], int], dict[str, Tensor]],
        validate: Callable[[int], dict[str, float]],
        export: Callable[[Path], None],
        export_name: str,
    ) -> None:
        """Trains from the checkpoint's step to the last one.

        Args:
            dataset, collate: of the training samples; see [`TrainingStream`].
            train_step: called with each batch and the step; runs forward and backward, steps the optimizer, and returns
                scalars for the metrics, among them "loss".
            validate: called by all processes with the step, on averaged weights; returns metrics.
            export: called on the main process with a folder, on averaged weights; writes the result there.
            export_name: name of the result's folder inside a checkpoint; the final result is in `output_dir` itself.
        """
        args, accelerator, step = self.args, self.accelerator, self.first_step
        self.output_dir.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("dnd_hf", {name: str(value) for name, value in asdict(args).items()})
        progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_local_main_process)
        window, started = [], perf_counter()
        batches = self._batches(dataset, collate)
        for index, batch in enumerate(batches, start=step * args.gradient_accumulation_steps):
            torch.manual_seed(mixed_seed(args.seed, index, accelerator.process_index))
            metrics = train_step(batch, step)
            window.append({name: value.detach() for name, value in metrics.items()})
            if not accelerator.sync_gradients:
                continue
            self.scheduler.step()
            self.ema.step(self.model.parameters())
            step += 1
            progress.update()
            finished = step == args.max_train_steps
            if step % args.logging_steps == 0 or finished:
                means = self._means(window)
                means["train/learning_rate"] = self.scheduler.get_last_lr()[0]
                samples = len(window) * args.train_batch_size * accelerator.num_processes
                means["train/images_per_second"] = samples / (perf_counter() - started)
                progress.set_postfix_str(
                    f"loss {means['train/loss']:.4f}, {means['train/images_per_second']:.1f} images/s"
                )
                accelerator.log(means, step)
                window, started = [], perf_counter()
            paused = perf_counter()
            if step % args.validation_steps == 0 or finished:
                with averaged_weights(self.ema, self.model), torch.no_grad():
                    accelerator.log({f"validation/{k}": v for k, v in validate(step).items()}, step)
                if accelerator.is_main_process:
                    plot_training_curves(self.output_dir / "metrics.jsonl", self.output_dir / "training_curves.png")
            if step % args.checkpointing_steps == 0 or finished:
                save_checkpoint(
                    accelerator,
                    self.output_dir,
                    step,
                    args.checkpoints_total_limit,
                    lambda folder: self._export(export, folder / export_name),
                )
            started += perf_counter() - paused
        progress.close()
        if accelerator.is_main_process:
            self._export(export, self.output_dir)
        accelerator.end_training()

    def _batches(self, dataset: Dataset, collate: Callable) -> DataLoader:
        args = self.args
        num_samples, first_sample = (
            args.max_train_steps * self.samples_per_step,
            self.first_step * self.samples_per_step,
        )
        stream = TrainingStream(dataset, num_samples, args.seed, first_sample)
        loader = DataLoader(
            stream,
            args.train_batch_size,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    def _means(self, window: list[dict[str, Tensor]]) -> dict[str, float]:
        names = window[-1]
        means = {name: torch.stack([entry[name] for entry in window if name in entry]).mean() for name in names}
        means = {f"train/{name}": value.item() for name, value in self.accelerator.reduce(means, "mean").items()}
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise RuntimeError(f"training has diverged, {', '.join(broken)} not finite: lower the learning rate.")
        return means

    def _export(self, export: Callable[[Path], None], folder: Path) -> None:
        with averaged_weights(self.ema, self.model):
            export(folder)
