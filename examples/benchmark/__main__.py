"""Times decoding, training, quantizing, tokenizing and extraction, beside the official code and beside the floor.

python examples/benchmark --sections decode quantize --reference DnD-Transformer --output_dir benchmarks
python examples/benchmark --sections trained --pipeline words --positions_per_pass 1 8 auto

`--reference` is a checkout of github.com/chenllliang/DnD-Transformer, and `--rq_reference`, for the section
architectures, one of github.com/kakaobrain/rq-vae-transformer; they are not part of this project and get the same
weights. Ours, the reference and the floor take turns in one process, so that whatever else the machine does meets all
of them; the numbers are medians. The floor is what the hardware needs for the arithmetic and the memory only: see
`decode.decode_floors`, `train_step.training_metrics` and `architectures.decode_floor`.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from architectures import architectures
from decode import decode, growth
from memory import memory
from official import Reference
from options import BenchmarkArguments
from quantizer import quantize
from report import describe_machine, table, write_results
from tokenizer import extract, tokenize
from train_step import train
from trained import trained

from dnd_hf.command_line import run_script
from dnd_hf.ops.cpu_precision import has_instructions


SUITES = {
    "decode": decode,
    "train": train,
    "quantize": quantize,
    "tokenize": tokenize,
    "extract": extract,
    "growth": growth,
    "architectures": architectures,
    "memory": memory,
    "trained": trained,
}
"""Of each section, the function that yields its rows."""


def main(args: BenchmarkArguments) -> None:
    device = torch.device(args.device or torch.accelerator.current_accelerator() or "cpu")
    if args.dtype is None:
        args.dtype = "bfloat16" if has_instructions(device, torch.bfloat16) else "float32"
    reference = Reference(args.reference) if args.reference else None
    machine, rows = describe_machine(device), []
    for section in args.sections:
        for line in SUITES[section](args, device, reference):
            rows.append(line)
            print(table([line]), flush=True)
    print(f"\n{table(rows)}\n\n{', '.join(machine.values())}; medians of {args.repeats}.")
    if args.output_dir:
        write_results(Path(args.output_dir), machine, asdict(args), rows)


if __name__ == "__main__":
    run_script(main, BenchmarkArguments)
