"""TrainingRun: the loop around a training step, with its schedule, averaged weights, validation and checkpoints."""

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..arguments import TrainingArguments
from ..figures import plot_training_curves, save_image_grid
from .checkpoints import find_checkpoint, list_checkpoints, save_checkpoint
from .data_order import TrainingStream, mixed_seed
from .metrics import JsonlTracker, read_metrics
from .optimization import WeightAverage, averaged_weights, whole_tensor
from .publishing import open_repository, upload_run, write_model_card
from .throughput import matmul_rate, peak_memory


class TrainingRun:
    """One training run, new or resumed: `prepare` the model, `resume`, then `loop`.

    The result depends on the arguments and the number of processes alone, not on where the run was interrupted: every
    forward pass has its own seed, and the data order is a [`TrainingStream`].

    Args:
        args: how the run goes.

    Raises:
        ValueError: no such checkpoint, `output_dir` holds another run's, or `--push_to_hub` cannot work.
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
        if self.accelerator.state.deepspeed_plugin is not None:  # what is "auto" in its configuration
            self.accelerator.state.deepspeed_plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": args.train_batch_size,
                "gradient_accumulation_steps": args.gradient_accumulation_steps,
                "gradient_clipping": args.max_grad_norm,
            }
        self.repo_id = open_repository(args) if self.accelerator.is_main_process else None

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, tokens_per_sample: int, flops_per_sample: int
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Prepares the trained model, its optimizer and learning rate schedule, and averages its weights.

        Args:
            model, optimizer: what is trained.
            tokens_per_sample, flops_per_sample: what a sample costs to train on, for the rates that are logged.
        """
        args = self.args
        self.model, self.tokens_per_sample, self.flops_per_sample = model, tokens_per_sample, flops_per_sample
        self.scheduler = get_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps)
        # FSDP shards the model in place; validation and the result need it whole.
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        self.whole_model = copy.deepcopy(model).cpu() if sharded else None
        prepared = self.accelerator.prepare(model, optimizer)
        self.ema = WeightAverage(model.parameters(), args.ema_decay)
        self.accelerator.register_for_checkpointing(self.scheduler, self.ema)
        return prepared

    def resume(self) -> None:
        """Loads the checkpoint, if there is one, into everything prepared so far."""
        if self.checkpoint is not None:
            self.accelerator.load_state(str(self.checkpoint))

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

    def loop(
        self,
        dataset: Dataset,
        collate: Callable,
        train_step: Callable[[dict[str, Tensor], int], dict[str, Tensor]],
        validate: Callable[[nn.Module, int], dict[str, float]],
        export: Callable[[nn.Module, Path], None],
        export_name: str,
        check: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    ) -> None:
        """Trains from the checkpoint's step to the last one.

        Args:
            dataset, collate: of the training samples; see [`TrainingStream`].
            train_step: called with each batch and the step; runs forward and backward, steps the optimizer, and returns
                scalars for the metrics, among them "loss".
            validate: called by all processes with the averaged model and the step; returns metrics.
            export: called on the main process with the averaged model and a folder; writes the result there.
            export_name: name of the result's folder inside a checkpoint; the final result is in `output_dir` itself.
            check: called by all processes with the metrics that are about to be logged and the step; raises to stop
                the run.

        Raises:
            RuntimeError: a metric is not finite. Checkpoints are saved only while all metrics since the one before
                are finite and pass `check`, so the last one is good. Or the upload failed; the result is complete.
        """
        args, accelerator, step = self.args, self.accelerator, self.first_step
        self.output_dir.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("dnd_hf", {name: str(value) for name, value in asdict(args).items()})
        precision = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        self.flops_rate = matmul_rate(accelerator.device, precision) * accelerator.num_processes
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
            checkpoint_due = step % args.checkpointing_steps == 0 or finished
            if step % args.logging_steps == 0 or checkpoint_due:
                means = self._means(window)
                self._check_finite(means, step)
                check(means, step)
                samples = len(window) * args.train_batch_size * accelerator.num_processes
                means |= self._rates(samples, perf_counter() - started)
                progress.set_postfix_str(f"loss {means['loss']:.4f}, {means['images_per_second']:.1f} images/s")
                accelerator.log({f"train/{name}": value for name, value in means.items()}, step)
                window, started = [], perf_counter()
            paused = perf_counter()
            if step % args.validation_steps == 0 or finished:
                with self.averaged_model() as averaged, torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    accelerator.log({f"validation/{k}": v for k, v in validate(averaged, step).items()}, step)
                if accelerator.is_main_process:
                    with suppress(ImportError):
                        metrics = read_metrics(self.output_dir / "metrics.jsonl")
                        plot_training_curves(metrics, self.output_dir / "training_curves.png")
            if checkpoint_due:
                save_checkpoint(
                    accelerator,
                    self.output_dir,
                    step,
                    args.checkpoints_total_limit,
                    lambda folder: self._export(export, folder / export_name),
                )
            started += perf_counter() - paused
        progress.close()
        self._export(export, self.output_dir)
        if accelerator.is_main_process:
            write_model_card(args, self.repo_id, accelerator, len(dataset))
        accelerator.end_training()
        if self.repo_id is not None:
            upload_run(self.output_dir, self.repo_id)

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
        return {name: value.item() for name, value in self.accelerator.reduce(means, "mean").items()}

    def _check_finite(self, metrics: dict[str, float], step: int) -> None:
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise RuntimeError(
                f"training has diverged by step {step}: {', '.join(broken)} not finite. {self.last_good_checkpoint}"
                " Try a lower --learning_rate, a longer --lr_warmup_steps, a smaller --max_grad_norm or"
                " --mixed_precision no."
            )

    @property
    def last_good_checkpoint(self) -> str:
        """A sentence for messages that end a run."""
        _, path = find_checkpoint(self.output_dir, "latest")
        return f"The last good checkpoint is {path}." if path else "There is no checkpoint yet."

    def _rates(self, samples: int, seconds: float) -> dict[str, float]:
        rate = samples / seconds
        return {
            "learning_rate": self.scheduler.get_last_lr()[0],
            "images_per_second": rate,
            "tokens_per_second": rate * self.tokens_per_sample,
            "mfu": rate * self.flops_per_sample / self.flops_rate,
            "peak_memory_gb": peak_memory(self.accelerator.device),
        }

    def show(self, images: list[Image.Image], columns: int, step: int) -> None:
        """Saves pictures of one size as the sample grid of a step, and gives it to the trackers that take pictures.

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

    def _export(self, export: Callable[[nn.Module, Path], None], folder: Path) -> None:
        with self.averaged_model() as averaged:
            if self.accelerator.is_main_process:
                export(averaged, folder)
