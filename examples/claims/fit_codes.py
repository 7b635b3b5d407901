"""Makes a tokenizer with other codes: the networks of a trained one, and codebooks fitted to their latents.

python examples/claims/fit_codes.py --vqvae rqvae --dataset_name images-train --code_depth 4 --code_patch_size 2 2 \
    --sample_size 64 128 --output_dir rqvae-pages

The networks stay as they are; only the codebooks learn, by the exponential moving averages of the quantizer itself.
Each depth has a codebook of its own, so that the first k codes are those of a tokenizer of depth k (lower_depth.py).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE
from dnd_hf.command_line import run_script
from dnd_hf.data.images import ImageDataset, ImageTransform, collate_images
from dnd_hf.data.sources import load_image_dataset


def changed(vqvae: RQVAE, **changes) -> RQVAE:
    """A tokenizer with the networks of `vqvae` and other settings of its codes, which are random."""
    vae = RQVAE.from_config(dict(vqvae.config) | changes)
    networks = {name: value for name, value in vqvae.state_dict().items() if not name.startswith("quantizer.")}
    loaded = vae.load_state_dict(networks, strict=False)
    assert not loaded.unexpected_keys and all(name.startswith("quantizer.") for name in loaded.missing_keys)
    return vae


@torch.no_grad()
def fit_codes(vae: RQVAE, images: ImageDataset | Subset, steps: int, batch_size: int, seed: int) -> list[float]:
    """Fits the codebook to the latents of images; returns the share of their variance that is lost at each step.

    Args:
        vae: its quantizer is trained.
        images: their latents are held in memory.
        steps: updates of the codebook.
        batch_size: vectors of an update, drawn at random.
        seed: of the draws.
    """
    torch.manual_seed(seed)
    batches = tqdm(DataLoader(images, 64, collate_fn=collate_images), desc="Encoding")
    vectors = torch.cat(
        [vae.cell_vectors(vae.encode(batch["pixel_values"]).latents).flatten(0, 2) for batch in batches]
    )
    variance = vectors.var(0).mean()
    vae.quantizer.train()
    lost = []
    for _ in tqdm(range(steps), desc="Codes"):
        batch = vectors[torch.randint(len(vectors), (batch_size,))]
        quantized, _, _ = vae.quantizer(batch)
        lost.append(((quantized - batch).square().mean() / variance).item())
    vae.quantizer.eval()
    return lost


@dataclass
class FittingArguments:
    """Options of this script."""

    vqvae: str = HfArg(help="The trained tokenizer: a folder or a Hub id.")
    dataset_name: str = HfArg(help="Images, as train_rqvae.py takes them.")
    output_dir: Path = HfArg(help="Folder of the new tokenizer.")
    code_depth: int = HfArg(help="Residual codes of a position.")
    sample_size: list[int] = HfArg(help="Height and width of the images.")
    num_codes: int | None = HfArg(default=None, help="Codes of a codebook; default: as many as that of --vqvae.")
    code_patch_size: list[int] = HfArg(default_factory=lambda: [1, 1], help="Latent cells of a position.")
    num_images: int = HfArg(default=2048, help="Images whose latents are held in memory.")
    steps: int = HfArg(default=400, help="Updates of the codebook.")
    batch_size: int = HfArg(default=8192, help="Vectors of an update.")
    seed: int = HfArg(default=0, help="Of the images and vectors drawn.")

    def __post_init__(self):
        for name in ("sample_size", "code_patch_size"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"`{name}` must be two numbers, got {getattr(self, name)}.")


def main(args: FittingArguments) -> None:
    if (args.output_dir / "config.json").exists():
        print(f"{args.output_dir} is there already.")
        return
    changes = dict(code_depth=args.code_depth, code_patch_size=args.code_patch_size, sample_size=args.sample_size)
    trained = RQVAE.from_pretrained(args.vqvae)
    num_codes = args.num_codes or trained.config.num_vq_embeddings
    vae = changed(trained, **changes, shared_codebook=False, num_vq_embeddings=num_codes).eval()
    images = load_image_dataset(
        args.dataset_name,
        ImageTransform(tuple(args.sample_size)),
        label_column=None,
        num_images=args.num_images,
        seed=args.seed,
    )
    lost = fit_codes(vae, images, args.steps, args.batch_size, args.seed)
    vae.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: the codes lose {lost[-1]:.4f} of the variance of the latents, {lost[0]:.4f} at first")


if __name__ == "__main__":
    run_script(main, FittingArguments)
