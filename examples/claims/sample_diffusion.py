"""Draws images from a rival that diffusion.py has trained, one for each seed, into a folder for each sampler.

python examples/claims/sample_diffusion.py --model ddpm --num_images 128 --output_dir images-ddpm

`evaluate.py --task prose --samples images-ddpm/ddim-50` measures them. What is there already is not drawn again.
"""

import argparse
from pathlib import Path

from rivals import load_rival
from tqdm.auto import tqdm

from dnd_hf.data.images import to_images
from dnd_hf.files import keep_settings, written_whole
from dnd_hf.training.settings import fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Folder of diffusion.py.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of a folder of images for each sampler.")
    parser.add_argument("--samplers", nargs="+", help="Default: all that the rival has.")
    parser.add_argument("--num_images", type=int, default=128, help="Of each sampler, with the seeds 0, 1, ...")
    parser.add_argument("--batch_size", type=int, default=32, help="Images at once.")
    args = parser.parse_args()
    rival = load_rival(args.model)
    rival.network.eval()
    unknown = set(args.samplers or ()) - set(rival.samplers)
    if unknown:
        parser.error(f"--samplers must be of {', '.join(rival.samplers)}, got {', '.join(sorted(unknown))}.")
    weights = fingerprint(rival.network)
    for sampler in args.samplers or rival.samplers:
        folder = args.output_dir / sampler
        folder.mkdir(parents=True, exist_ok=True)
        keep_settings(folder / "sampling.json", {"weights": weights, "sampler": sampler}, "samples of other settings")
        files = {seed: folder / f"{seed:06d}.png" for seed in range(args.num_images)}
        missing = [seed for seed, file in files.items() if not file.exists()]
        for start in tqdm(range(0, len(missing), args.batch_size), desc=sampler):
            seeds = missing[start : start + args.batch_size]
            for seed, image in zip(seeds, to_images(rival.sample(seeds, sampler)), strict=True):
                with written_whole(files[seed]) as unfinished:
                    image.save(unfinished, format="PNG")


if __name__ == "__main__":
    main()
