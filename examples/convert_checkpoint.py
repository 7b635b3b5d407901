# /// script
# requires-python = ">=3.11"
# dependencies = ["dnd-hf"]
#
# [tool.uv.sources]
# dnd-hf = { path = "..", editable = true }
# ///
"""Converts official checkpoints to this package's folders, and back; docs/checkpoints.md has a command for each.

python examples/convert_checkpoint.py --transformer_checkpoint XXL.pt --rqvae_checkpoint rqvae/model.pt \
    --output_dir dnd-xxl
python examples/convert_checkpoint.py --transformer_checkpoint stage2/model.pt --rqvae_checkpoint stage1/model.pt \
    --output_dir rq-transformer
python examples/convert_checkpoint.py --to_original dnd-xxl --output_dir dnd-xxl-original

A transformer and its tokenizer become a pipeline, one of them without the other the folder of a model.
"""

import os


if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("Loading the libraries ...", flush=True)

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from dnd_hf import DnDPipeline
from dnd_hf.command_line import run_script
from dnd_hf.conversion import convert_any_transformer, convert_pipeline, convert_rqvae, export_original
from dnd_hf.files import new_folder


SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")


@dataclass
class ConversionArguments:
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    transformer_checkpoint: str | None = HfArg(
        default=None, help="Of the DnD-Transformer, LlamaGen or the RQ-Transformer (.pt)."
    )
    transformer_config: str | None = HfArg(default=None, help="Default: config.yaml beside the RQ-Transformer.")
    rqvae_checkpoint: str | None = HfArg(default=None, help="An RQ-VAE, or a tokenizer of LlamaGen (.pt).")
    rqvae_config: str | None = HfArg(default=None, help="Default: config.yaml beside the RQ-VAE.")
    prompt_vocab: str | None = HfArg(default=None, help="Of a text-conditional model: its bpe-16k-vocab.json.")
    prompt_merges: str | None = HfArg(default=None, help="And its bpe-16k-merges.txt.")
    to_original: str | None = HfArg(default=None, help="Instead: write this folder in the official format.")
    output_dir: str | None = HfArg(default=None, help="New folder for the result; appears whole or not at all.")
    prediction_layers: list[int] = HfArg(default_factory=list, help="Layers of the heads, from 0; default: inferred.")
    num_attention_heads: int | None = HfArg(default=None, help="Default: heads of 64 dimensions (LlamaGen-3B: 100).")
    grid_size: list[int] = HfArg(default_factory=list, help="Height and width of the codes; default: inferred.")
    num_classes: int | None = HfArg(default=None, help="Without the null class; default: inferred.")
    id2label: str | None = HfArg(default=None, help="JSON list of names; default: ImageNet's for 1000 classes.")
    use_ema: bool = HfArg(default=False, help="Take the averaged weights of the transformer.")
    rqvae_use_ema: bool = HfArg(default=False, help="Take the averaged weights of the tokenizer.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = HfArg(default=None, help="Default: as in the file.")
    max_shard_size: str = HfArg(default="5GB", help="Larger weights are split into several files.")
    guidance_scale: float | None = HfArg(default=None, help="Default of this and the next three: the paper's setting.")
    temperature: float | None = HfArg(default=None, help="Written into generation_config.json, as the others.")
    top_k: int | None = HfArg(default=None, help="Only the k most likely codes may be drawn; 0: all.")
    top_p: float | None = HfArg(default=None, help="Only the likeliest codes of this total probability may be drawn.")

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("--output_dir is needed.")
        if bool(self.to_original) == bool(self.transformer_checkpoint or self.rqvae_checkpoint):
            raise ValueError("Either --to_original, or --transformer_checkpoint and/or --rqvae_checkpoint is needed.")
        needed = ("transformer_config", "use_ema", "prediction_layers", "num_attention_heads")
        if not self.transformer_checkpoint and any(getattr(self, name) for name in needed):
            raise ValueError(f"{', '.join(f'--{name}' for name in needed)} need --transformer_checkpoint.")


def main(args: ConversionArguments) -> None:
    if args.to_original:
        export_original(args.to_original, args.output_dir)
        print(f"Saved to {args.output_dir}, in the official format of {args.to_original}.")
        return
    shared = dict(grid_size=args.grid_size or None, dtype=args.dtype and getattr(torch, args.dtype))
    tokenizer = dict(rqvae_config=args.rqvae_config, rqvae_use_ema=args.rqvae_use_ema)
    transformer = dict(
        prediction_layers=args.prediction_layers or None,
        num_attention_heads=args.num_attention_heads,
        num_classes=args.num_classes,
        id2label=args.id2label and dict(enumerate(json.loads(Path(args.id2label).read_text(encoding="utf-8")))),
        use_ema=args.use_ema,
    )
    with new_folder(args.output_dir) as folder:
        if args.transformer_checkpoint and args.rqvae_checkpoint:
            model = convert_pipeline(
                args.transformer_checkpoint,
                args.rqvae_checkpoint,
                transformer_config=args.transformer_config,
                prompt_vocab=args.prompt_vocab,
                prompt_merges=args.prompt_merges,
                **tokenizer,
                **transformer,
                **shared,
            )
        elif args.transformer_checkpoint:
            model = convert_any_transformer(
                args.transformer_checkpoint, config=args.transformer_config, **transformer, **shared
            )
        else:
            model = convert_rqvae(args.rqvae_checkpoint, args.rqvae_config, use_ema=args.rqvae_use_ema, **shared)
        if args.transformer_checkpoint:
            generation_config = getattr(model, "transformer", model).generation_config
            settings = {name: getattr(args, name) for name in SAMPLING}
            generation_config.update(**{name: value for name, value in settings.items() if value is not None})
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
    print(f"Saved a {type(model).__name__} to {args.output_dir}. Next: {next_command(args, model)}")


def next_command(args: ConversionArguments, model: torch.nn.Module | DnDPipeline) -> str:
    """What to do with the result, as a command."""
    if args.transformer_checkpoint and args.rqvae_checkpoint:
        words = ["generate.py", "--model", args.output_dir, "--output", "grid.png"]
        words += ["--prompts", "a red car"] if args.prompt_vocab else []
    elif args.transformer_checkpoint:
        words = ["train.py", "--architecture", model.config.model_type, "--pretrained_transformer", args.output_dir]
        words += ["--codes_dir", "codes", "--output_dir", "dnd"]
    else:
        words = ["extract_codes.py", "--dataset_name", "images", "--vqvae", args.output_dir, "--output_dir", "codes"]
    return shlex.join(["python", f"examples/{words[0]}", *words[1:]])


if __name__ == "__main__":
    run_script(main, ConversionArguments)
