# /// script
# requires-python = ">=3.11"
# dependencies = ["dnd-hf[eval,fid]"]
#
# [tool.uv.sources]
# dnd-hf = { path = "..", editable = true }
# ///
"""Measures tokenizers and pipelines; writes results.json, results.md and images. See docs/evaluation.md.

python examples/evaluate.py --task words --model words --output_dir runs/evaluate-words
python examples/evaluate.py --task rocr --model rqvae --dataset_name pages --text_column text --output_dir runs/rocr
python examples/evaluate.py --task reconstruction --model rqvae --dataset_name photos --output_dir runs/reconstruction
python examples/evaluate.py --task ppl_ocr --model dnd --dataset_name pages --language_model gpt2 --output_dir runs/ppl
python examples/evaluate.py --task prose --model dnd --dataset_name pages --training_text text.jsonl \
    --output_dir runs/prose
accelerate launch examples/evaluate.py --task generation --model dnd --reference VIRTUAL_imagenet256_labeled.npz \
    --output_dir runs/generation
"""

import os


if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("Loading the libraries ...", flush=True)

from dataclasses import MISSING, dataclass, fields
from typing import Literal

from transformers.hf_argparser import HfArg

from dnd_hf.command_line import run_script
from dnd_hf.evaluation import generation, ppl_ocr, prose, reconstruction, rocr, words
from dnd_hf.figures import import_figure
from dnd_hf.processes import connected, end_processes


TASKS = {
    "rocr": (rocr, rocr.ROCROptions),
    "reconstruction": (reconstruction, reconstruction.ReconstructionOptions),
    "ppl_ocr": (ppl_ocr, ppl_ocr.PplOCROptions),
    "prose": (prose, prose.ProseOptions),
    "generation": (generation, generation.GenerationOptions),
    "words": (words, words.WordsOptions),
}
"""Of each task, the module that checks and runs it, and its options."""

SHARED_BY_PROCESSES = ("generation", "ppl_ocr", "prose")


@dataclass
class EvaluationArguments(
    generation.GenerationOptions,
    ppl_ocr.PplOCROptions,
    prose.ProseOptions,
    rocr.ROCROptions,
    reconstruction.ReconstructionOptions,
    words.WordsOptions,
):
    """Options of this script: those of all tasks. They can also be in a YAML file given as `--config`."""

    task: Literal["rocr", "reconstruction", "ppl_ocr", "prose", "generation", "words"] | None = HfArg(
        default=None, help="What to measure."
    )

    def __post_init__(self):
        if self.task is None:
            raise ValueError("`task` is needed: what to measure.")
        module, options_class = TASKS[self.task]
        taken = {"task"} | {field.name for field in fields(options_class)}
        unused = [field.name for field in fields(self) if field.name not in taken and not self.is_default(field)]
        if unused:
            raise ValueError(f"the task {self.task} makes no use of {', '.join(f'`{name}`' for name in unused)}.")
        module.check(self)

    def is_default(self, field) -> bool:
        default = field.default if field.default_factory is MISSING else field.default_factory()
        return getattr(self, field.name) == default


def main(args: EvaluationArguments) -> None:
    if args.state.num_processes > 1 and args.task not in SHARED_BY_PROCESSES:
        raise ValueError(f"the `task` {args.task} runs in one process: start it without `accelerate launch`.")
    import_figure()  # so that a missing package shows before the long work
    module, options_class = TASKS[args.task]
    with connected(lambda: "Images that are made stay: start all processes again with the same command."):
        report = module.run(args)
        if args.state.is_main_process:
            settings = {field.name: getattr(args, field.name) for field in fields(options_class)}
            report.write(args.output_dir, args.task, settings, args.run_device)
            print(report.markdown(args.task).rstrip())
            print(f"written to {args.folder / 'results.json'} and {args.folder / 'results.md'}")
        end_processes()


if __name__ == "__main__":
    run_script(main, EvaluationArguments)
