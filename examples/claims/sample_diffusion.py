"""Draws images from a rival that diffusion.py has trained, one for each seed, into a folder for each sampler.

python examples/claims/sample_diffusion.py --model ddpm --num_images 128 --output_dir images-ddpm

`evaluate.py --task prose --samples images-ddpm/ddim-50` measures them. What is there already is not drawn again.
"""

from dataclasses import dataclass
from pathlib import Path

from rivals import Rival, load_rival
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from dnd_hf.command_line import run_script
from dnd_hf.data.images import to_images
from dnd_hf.files import keep_settings, written_whole
from dnd_hf.training.settings import fingerprint


def sample_images(rival: Rival, sampler: str, folder: Path, num_images: int, batch_size: int) -> None:
    """Writes `000000.png`, ... of the seeds 0, 1, ... where they are not there already.

    Raises ValueError where the folder holds samples of other weights or of another sampler.
    """
    settings = {"weights": fingerprint(rival.network), "sampler": sampler}
    keep_settings(folder / "sampling.json", settings, "samples of other settings")
    files = {seed: folder / f"{seed:06d}.png" for seed in range(num_images)}
    missing = [seed for seed, file in files.items() if not file.exists()]
    for start in tqdm(range(0, len(missing), batch_size), desc=sampler):
        seeds = missing[start : start + batch_size]
        for seed, image in zip(seeds, to_images(rival.sample(seeds, sampler)), strict=True):
            with written_whole(files[seed]) as unfinished:
                image.save(unfinished, format="PNG")


@dataclass
class SamplesArguments:
    """Options of this script."""

    model: Path = HfArg(help="Folder of diffusion.py.")
    output_dir: Path = HfArg(help="Folder of a folder of images for each sampler.")
    samplers: list[str] | None = HfArg(default=None, help="Default: all that the rival has.")
    num_images: int = HfArg(default=128, help="Of each sampler, with the seeds 0, 1, ...")
    batch_size: int = HfArg(default=32, help="Images at once.")


def main(args: SamplesArguments) -> None:
    rival = load_rival(args.model)
    unknown = set(args.samplers or ()) - set(rival.samplers)
    if unknown:
        raise ValueError(f"`samplers` must be of {', '.join(rival.samplers)}, got {', '.join(sorted(unknown))}.")
    for sampler in args.samplers or rival.samplers:
        sample_images(rival, sampler, args.output_dir / sampler, args.num_images, args.batch_size)


if __name__ == "__main__":
    run_script(main, SamplesArguments)
