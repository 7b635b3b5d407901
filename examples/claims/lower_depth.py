"""Keeps the first codes of each position: makes a codes folder and its tokenizer of a lower depth from given ones.

python examples/claims/lower_depth.py --codes_dir codes-4 --code_depth 2 --output_dir codes-2

Residual codes with a codebook for each depth do not depend on those after them, so this is what `fit_codes.py` with the
lower depth and `extract_codes.py` would make.
"""

from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE
from dnd_hf.command_line import run_script
from dnd_hf.data.codes import CodesDataset, CodesWriter, codes_features, collate_codes
from dnd_hf.files import read_json


def shortened(vqvae: RQVAE, depth: int) -> RQVAE:
    """The tokenizer that has the first `depth` codebooks of `vqvae`; ValueError where it has one for all depths."""
    if vqvae.config.shared_codebook:
        raise ValueError("`vqvae` has one codebook for all depths: a tokenizer of a lower depth would have another.")
    vae = RQVAE.from_config(dict(vqvae.config) | {"code_depth": depth})
    weights = vqvae.state_dict()
    for name in ("codebooks", "cluster_sizes", "embedding_sums"):
        weights[f"quantizer.{name}"] = weights[f"quantizer.{name}"][:depth]
    vae.load_state_dict(weights)
    return vae.eval()


@dataclass
class LowerDepthArguments:
    """Options of this script."""

    codes_dir: Path = HfArg(help="Folder of extract_codes.py.")
    code_depth: int = HfArg(help="Codes to keep of each position.")
    output_dir: Path = HfArg(help="The new folder of codes and tokenizer.")


def main(args: LowerDepthArguments) -> None:
    codes = CodesDataset(args.codes_dir)
    if not 1 <= args.code_depth <= codes.shape[-1]:
        raise ValueError(f"`code_depth` must lie in [1, {codes.shape[-1]}], got {args.code_depth}.")
    vae = shortened(RQVAE.from_pretrained(args.codes_dir, subfolder="vqvae"), args.code_depth)
    settings = read_json(args.codes_dir / "extraction.json") | {"code_depth": args.code_depth}
    writer = CodesWriter(
        args.output_dir, codes_features((*codes.shape[:2], args.code_depth), codes.class_names), settings
    )
    if writer.is_complete:
        print(f"{args.output_dir} is complete already.")
        return
    indices = codes.rows.with_format("torch", columns=["image_index"])["image_index"][:]
    batches = DataLoader(codes, len(codes), collate_fn=collate_codes)
    rows = [(batch["codes"][..., : args.code_depth].int(), batch["labels"], indices) for batch in batches]
    writer.write(0, 0, True, rows, [])
    vae.save_pretrained(args.output_dir / "vqvae")
    writer.finish()
    print(f"{args.output_dir}: {len(codes)} images of {args.code_depth} codes a position")


if __name__ == "__main__":
    run_script(main, LowerDepthArguments)
