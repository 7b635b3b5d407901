"""TrainingRun: the loop around a training step, with its schedule, averaged weights, validation and checkpoints."""

import copy
import math
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from traceback import clear_frames
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..command_line import name_options
from ..figures import plot_training_curves, save_image_grid
from ..files import locked
from ..ops.memory import kept_memory
from ..processes import connected, end_processes
from .checkpoints import find_checkpoint, remove_unfinished, save_checkpoint
from .data_order import SizedDataset, TrainingStream, mixed_seed
from .environment import RunEnvironment
from .interrupts import StopRequest, ignore_stop_signals
from .metrics import MetricsWindow, read_metrics
from .optimization import WeightAverage, averaged_weights, whole_tensor
from .publishing import upload_run, write_model_card
from .safe_loading import check_pickles
from .settings import check_settings, write_settings
from .summary import as_text, metrics_text, run_summary, with_steps
from .throughput import peak_flops, peak_memory


class TrainingRun(ABC):
    """One training run, new or resumed. A script subclasses it with what is its own, then calls [`train`].

    The result depends on the options and the number of processes only, not on where the run was interrupted: every
    forward pass has its own seed, and the data order is a [`TrainingStream`].

    Attributes:
        result_name: what the result's folder inside a checkpoint is called; the final result is in `output_dir` itself.
        model: what is trained, as it was given.
        wrapped_model: the same for the forward pass: it averages the gradients of all processes.
        optimizer, scheduler, ema: prepared; `ema` averages the weights of `model`.

    Args:
        environment: options, devices and checkpoint.
        model, optimizer: what is trained.
        dataset, collate: of the training samples; see [`TrainingStream`].
        tokens_per_sample, flops_per_sample: what a sample costs to train on, for the rates that are logged.
    """

    result_name: str

    def __init__(
        self,
        environment: RunEnvironment,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: SizedDataset,
        collate: Callable,
        tokens_per_sample: int,
        flops_per_sample: int,
    ):
        args = self.args = with_steps(environment.args, len(dataset), environment.samples_per_step)
        accelerator = self.accelerator = environment.accelerator
        self.environment, self.output_dir, self.first_step = environment, environment.output_dir, environment.first_step
        if self.first_step > args.max_train_steps:
            raise ValueError(f"`max_train_steps` is {args.max_train_steps}, {environment.checkpoint} is beyond it.")
        self.dataset, self.collate, self.model = dataset, collate, model
        self.tokens_per_sample, self.flops_per_sample = tokens_per_sample, flops_per_sample
        self.scheduler = get_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps)
        # FSDP shards the model in place; validation and the result need it whole.
        sharded = accelerator.distributed_type == DistributedType.FSDP
        self.whole_model = copy.deepcopy(model).cpu() if sharded else None
        self.wrapped_model, self.optimizer = accelerator.prepare(model, optimizer)
        self.ema = WeightAverage(model.parameters(), args.ema_decay)
        accelerator.register_for_checkpointing(self.scheduler, self.ema)
        # Mixed precision computes in float32 too, which is the faster of the two on some CPUs.
        dtypes = (torch.float32, torch.bfloat16) if accelerator.mixed_precision == "bf16" else (torch.float32,)
        self.peak_flops = peak_flops(accelerator.device, *dtypes) * accelerator.num_processes
        self.window = MetricsWindow()

    @abstractmethod
    def train_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Runs forward and backward on a batch and steps the optimizer, which waits while gradients accumulate.

        Returns:
            Scalars for the metrics, among them "loss".
        """

    @abstractmethod
    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Metrics of the held-out samples; called by all processes with the averaged model, in evaluation mode."""

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes the result to a folder; called on the main process with the averaged model."""

    def check(self, metrics: dict[str, float], step: int) -> None:  # noqa: B027 - a run need not
        """Raises RuntimeError to stop the run; called by all processes with the metrics about to be logged."""

    def next_command(self) -> str:
        """What to do with the result, as a command."""
        return ""

    def train(self) -> None:
        """Trains from the checkpoint's step to the last one.

        Raises:
            SystemExit: SIGINT or SIGTERM asked the run to stop; it has written a checkpoint.
            RuntimeError: a metric is not finite. Checkpoints are saved only while all metrics since the one before
                are finite and pass `check`, so the last one is good. Or the upload failed; the result is complete.
        """
        args, accelerator = self.args, self.accelerator
        self._resume()
        with locked(self.output_dir) if accelerator.is_main_process else nullcontext():
            if accelerator.is_main_process:
                remove_unfinished(self.output_dir)
                self._print(as_text(self.summary()))
            accelerator.wait_for_everyone()
            accelerator.init_trackers("dnd_hf", {name: str(value) for name, value in asdict(args).items()})
            memory = kept_memory() if accelerator.device.type == "cpu" else nullcontext()
            with StopRequest(accelerator) as stop, connected(self._advice), memory:
                self._run_steps(stop)
            self._export(self.output_dir)
            if accelerator.is_main_process:
                write_model_card(args, self.environment.repo_id, accelerator, len(self.dataset))
            self._end()
        if accelerator.is_main_process:
            print(f"Saved to {self.output_dir}. Next: {self.next_command()}")
        if self.environment.repo_id is not None:
            upload_run(self.output_dir, self.environment.repo_id)

    def _print(self, message: str) -> None:
        print(name_options(message, type(self.args)), flush=True)

    def summary(self) -> dict[str, str]:
        """What the run is about to do, by topic, for the console."""
        return run_summary(self.environment, self.args, self.model, len(self.dataset))

    def facts(self) -> dict[str, Any]:
        """What the result depends on beside the options, as JSON values; a run resumes only where they are the same."""
        return {
            "samples_per_step": self.environment.samples_per_step,
            "mixed_precision": self.accelerator.mixed_precision,
            "num_train_samples": len(self.dataset),
        }

    def _resume(self) -> None:
        checkpoint = self.environment.checkpoint
        if checkpoint is not None:
            told = check_settings(checkpoint, self.args, self.facts())
            check_pickles(checkpoint)
            self.accelerator.load_state(str(checkpoint))
            if self.accelerator.is_main_process:
                print(f"Resumed at step {self.first_step:,} from {checkpoint}. {told}".strip())

    def _run_steps(self, stop: StopRequest) -> None:
        args, step = self.args, self.first_step
        if self._is_validation_missing():
            self._validate(step)
        self.window.restart()
        with self._progress_bar() as progress, closing(self._batches()) as batches:  # whose end is that of the workers
            for index, batch in enumerate(batches, start=step * args.gradient_accumulation_steps):
                torch.manual_seed(mixed_seed(args.seed, index, self.accelerator.process_index))
                self.window.add(self.train_step(batch, step))
                if not self.accelerator.sync_gradients:
                    continue
                self.scheduler.step()
                self.ema.step(self.model.parameters())
                step += 1
                progress.update()
                finished, stopped = step == args.max_train_steps, stop.agreed(step)
                checkpoint_due = step % args.checkpointing_steps == 0 or finished or stopped
                if step % args.logging_steps == 0 or checkpoint_due:
                    progress.set_postfix_str(self._log(step))
                with self.window.paused():
                    if checkpoint_due:
                        self._save(step)
                    if stopped:
                        progress.close()
                        self._leave(step, stopped)
                    if step % args.validation_steps == 0 or finished:
                        self._validate(step)

    def _advice(self) -> str:
        return f"{self.last_good_checkpoint} Start all processes again, with `resume_from_checkpoint` latest."

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.args.max_train_steps,
            initial=self.first_step,
            unit=" steps",
            disable=not self.accelerator.is_main_process,
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )

    def _leave(self, step: int, number: int) -> NoReturn:
        self._end()
        if self.accelerator.is_main_process:
            self._print(
                f"Stopped by {signal.Signals(number).name} after step {step:,}; {self.output_dir}/checkpoint-{step} is"
                " written. To resume, give the same command with `resume_from_checkpoint` latest."
            )
        sys.exit(128 + number)

    def _end(self) -> None:
        end_processes()
        self.accelerator.end_training()  # which finishes the trackers

    def _is_validation_missing(self) -> bool:
        """Whether the run that is resumed was stopped between a checkpoint and its validation."""
        step, args = self.first_step, self.args
        if not step or (step % args.validation_steps and step != args.max_train_steps):
            return False
        lines = read_metrics(self.output_dir / "metrics.jsonl") if self.accelerator.is_main_process else []
        done = any(line["step"] == step and any(map(_is_validation, line)) for line in lines)
        return not broadcast_object_list([done])[0]

    def clip_gradients(self) -> dict[str, Tensor]:
        """Scales the gradients down to `max_grad_norm` where the optimizer is about to step.

        Returns:
            `{"grad_norm": scalar}`, the norm before, or `{}` while gradients accumulate.
        """
        if not self.accelerator.sync_gradients:
            return {}
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        return {"grad_norm": torch.as_tensor(whole_tensor(norm), device=self.accelerator.device)}

    @contextmanager
    def averaged_model(self) -> Iterator[nn.Module]:
        """The whole model with averaged weights, in evaluation mode, on every process; all must enter."""
        if self.whole_model is None:
            with averaged_weights(self.ema, self.model):
                yield self.model
            return
        model = self.whole_model.to(self.accelerator.device).eval()
        with torch.no_grad():
            for parameter, average in zip(model.parameters(), self.ema.shadow_params):
                parameter.copy_(whole_tensor(average))
        yield model
        model.cpu()

    def show(self, images: list[Image.Image], columns: int, step: int) -> None:
        """Saves images of one size as the sample grid of a step, and gives it to the trackers that take images.

        To be called on the main process.
        """
        path = self.output_dir / "samples" / f"step-{step}.png"
        save_image_grid(images, columns, path)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(Image.open(path))[None]}, step, **layout)
            elif tracker.name == "trackio":  # to which Accelerate passes numbers only
                import trackio

                tracker.log({"samples": trackio.Image(path)}, step)

    @property
    def last_good_checkpoint(self) -> str:
        """A sentence for messages that end a run."""
        _, path = find_checkpoint(self.output_dir, "latest")
        return f"The last good checkpoint is {path}." if path else "There is no checkpoint yet."

    def _batches(self) -> Generator[dict[str, Tensor], None, None]:
        args, samples_per_step = self.args, self.environment.samples_per_step
        num_samples, first_sample = args.max_train_steps * samples_per_step, self.first_step * samples_per_step
        loader = DataLoader(
            TrainingStream(self.dataset, num_samples, args.seed, first_sample),
            args.train_batch_size,
            collate_fn=self.collate,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=ignore_stop_signals,
            pin_memory=torch.cuda.is_available(),
        )
        try:
            yield from self.accelerator.prepare(loader)
        except Exception as error:
            clear_frames(error.__traceback__)  # which keep the workers: they ignore the signal to end
            raise

    def _log(self, step: int) -> str:
        """Logs the metrics since the last time; returns what the progress bar shows of them."""
        means, passes, seconds = self.window.close(self.accelerator)
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise RuntimeError(
                f"training has diverged by step {step}: {', '.join(broken)} not finite. {self.last_good_checkpoint}"
                " Try a lower `learning_rate`, a longer `lr_warmup_steps`, a smaller `max_grad_norm` or"
                " `mixed_precision` no."
            )
        self.check(means, step)
        rate = passes * self.args.train_batch_size * self.accelerator.num_processes / seconds
        flops = rate * self.flops_per_sample
        self.peak_flops = max(self.peak_flops, flops)  # a machine that was busy when the peak was measured
        means |= {
            "learning_rate": self.scheduler.get_last_lr()[0],
            "images_per_second": rate,
            "tokens_per_second": rate * self.tokens_per_sample,
            "mfu": flops / self.peak_flops,
            "peak_memory_gb": peak_memory(self.accelerator.device),
        }
        self.accelerator.log({f"train/{name}": value for name, value in means.items()}, step)
        return f"loss {means['loss']:.4f}, {rate:.1f} images/s"

    def _validate(self, step: int) -> None:
        with self.averaged_model() as averaged, torch.no_grad(), torch.compiler.set_stance("force_eager"):
            metrics = self.validate(averaged, step)
        self.accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step)
        if self.accelerator.is_main_process:
            tqdm.write(f"Validation after step {step:,}: {metrics_text(metrics)}")
            with suppress(ImportError):
                lines = read_metrics(self.output_dir / "metrics.jsonl")
                plot_training_curves(lines, self.output_dir / "training_curves.png")

    def _save(self, step: int) -> None:
        save_checkpoint(
            self.accelerator,
            self.output_dir,
            step,
            self.args.checkpoints_total_limit,
            self._fill_checkpoint,
        )

    def _fill_checkpoint(self, folder: Path) -> None:
        self._export(folder / self.result_name)
        if self.accelerator.is_main_process:
            write_settings(folder, self.args, self.facts())

    def _export(self, folder: Path) -> None:
        with self.averaged_model() as averaged:
            if self.accelerator.is_main_process:
                self.export(averaged, folder)


def _is_validation(name: str) -> bool:
    return name.startswith("validation/")
