"""RunEnvironment: what a training run needs before its model: devices, precision, trackers, checkpoint, repository."""

import os
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from ..arguments import RunArguments
from ..ops.cpu_precision import warn_of_slow_precision
from .checkpoints import find_checkpoint, list_checkpoints
from .metrics import JsonlTracker
from .publishing import open_repository


class RunEnvironment:
    """Made before anything is loaded, so that what cannot work is refused at once; nothing is written yet.

    Attributes:
        accelerator: devices, processes, precision and trackers.
        checkpoint, first_step: what the run resumes from, `None` and 0 for a new one.
        repo_id: where `push_to_hub` uploads to, on the main process; `None` without it.

    Args:
        args: options of the run.

    Raises:
        ValueError: no such checkpoint, `output_dir` holds another run's, or `push_to_hub` cannot work.
    """

    def __init__(self, args: RunArguments):
        self.args, self.output_dir = args, Path(args.output_dir)
        self.first_step, self.checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        if args.resume_from_checkpoint is None and list_checkpoints(args.output_dir):
            raise ValueError(
                f"{args.output_dir} holds checkpoints: give another `output_dir`, or `resume_from_checkpoint` latest."
            )
        # Accelerate knows the option below by its old name only.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=choose_precision(args),
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=[JsonlTracker(self.output_dir / "metrics.jsonl", self.first_step), *args.report_to],
            project_dir=args.output_dir,
            # The quantizer keeps its codebooks equal over the processes itself.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError("train in bf16 or float32: fp16 is too narrow for the quantizer and the GAN's weight.")
        if self.accelerator.mixed_precision == "bf16":
            warn_of_slow_precision(self.accelerator.device, torch.bfloat16)
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


def choose_precision(args: RunArguments) -> str:
    """The precision that `args` ask for, else that of `accelerate launch`, else bf16 on GPUs that have it.

    `accelerate launch` without a configuration says "no", as if that had been asked for: it does not count.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.mixed_precision is not None or launched != "no":
        return args.mixed_precision or launched
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "no"
