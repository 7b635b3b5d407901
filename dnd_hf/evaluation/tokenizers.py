"""Tokenizers under measurement: their options, how they are opened, and a grid of what their codes keep."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..bundled import checkpoint_path
from ..command_line import loading
from ..data.images import ImageDataset, to_images
from ..figures import save_image_grid
from ..models.autoencoder_rqvae import RQVAE
from .images import read_batches
from .options import RealImageOptions, option


@dataclass
class TokenizerOptions(RealImageOptions):
    """Tokenizers, and how many of their codes to decode with."""

    depths: list[int] = option([], "Numbers of codes to decode with, for rocr and reconstruction; default: each.")

    def load_tokenizer(self, name: str) -> RQVAE:
        """A tokenizer, or that of a pipeline."""
        name = checkpoint_path(name)
        with loading(name):
            try:
                vae = RQVAE.from_pretrained(name, subfolder="vqvae")
            except OSError:
                vae = RQVAE.from_pretrained(name)
        return vae.to(self.run_device).eval()

    def open_tokenizers(self) -> Iterator[tuple[str, RQVAE, ImageDataset]]:
        """(name, tokenizer, real images at its size) of each model, after all have been checked.

        One tokenizer is in memory at a time.

        Raises:
            ValueError: a depth or a size that one of them does not take; see also `load_dataset`.
        """
        sizes = {}
        for name in self.model:
            vae = self.load_tokenizer(name)
            check_depths(vae, self.depths)
            sizes[name] = self.size_for(vae)
            self.load_dataset(sizes[name])
        for name, size in sizes.items():
            yield name, self.load_tokenizer(name), self.load_dataset(size)

    @torch.inference_mode()
    def save_reconstructions(self, file: str, name: str, vae: RQVAE, dataset: ImageDataset) -> dict[str, str]:
        """Writes a grid of the first images, each beside what its first 1, 2, ... codes make of it (Figure 3).

        Returns its caption, by its name in `output_dir`.
        """
        _, images, _ = next(read_batches(dataset, 8, []))
        codes = vae.encode(images.to(vae.device)).codes
        depths = check_depths(vae, self.depths)
        decoded = [vae.decode_codes(codes, depth=k).sample.cpu() for k in depths]
        rows = torch.stack([images, *decoded], dim=1)
        save_image_grid(to_images(rows.flatten(0, 1)), rows.shape[1], self.folder / file)
        return {file: f"{name}: originals, then decoded with {', '.join(map(str, depths))} codes"}


def check_depths(vae: RQVAE, depths: Sequence[int] | None) -> list[int]:
    """`depths` in ascending order, each once; all of the tokenizer's where None. ValueError for one out of range."""
    limit = vae.config.code_depth
    chosen = sorted(set(depths or range(1, limit + 1)))
    if not 1 <= chosen[0] <= chosen[-1] <= limit:
        raise ValueError(f"`depths` must lie in [1, {limit}] with this tokenizer, got {list(depths or ())}.")
    return chosen
