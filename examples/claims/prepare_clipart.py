"""Writes the images of `clipart`: 16 categories of Debian's package openclipart-png, all of it in the public domain.

python examples/claims/prepare_clipart.py --output_dir clipart

`train/` and `held_out/` hold a folder of PNG files for each class. Each image is trimmed to its content, laid on the
middle of a white square, and resized. Where several look the same at 16 x 16 px only the first remains, so that no
image has a twin on the other side of the division.
"""

import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops
from transformers.hf_argparser import HfArg

from dnd_hf.command_line import run_script


FOLDER = Path("/usr/share/openclipart/png")

CLASSES = {  # folders of the package, and what of them belongs to another class
    "animal": (["animals"], []),
    "arrow": (["shapes/arrows", "computer/buttons"], []),
    "building": (["buildings"], []),
    "coloured icon": (["computer/icons/lemon-theme"], []),
    "device": (["computer/hardware", "electronics"], []),
    "flag": (["signs_and_symbols/flags"], []),
    "food": (["food"], []),
    "gray icon": (["computer/icons/flat-theme"], []),
    "map": (["geography"], []),
    "music": (["recreation/music"], []),
    "office": (["office"], []),
    "person": (["people"], []),
    "plant": (["plants"], []),
    "playing card": (["recreation/games/cards"], []),
    "sign": (["signs_and_symbols/map_symbols", "transportation/aiga-symbols"], []),
    "vehicle": (["transportation"], ["transportation/aiga-symbols", "transportation/roadsigns"]),
}

MOST = 400
"""Images of a class; of larger ones a random part is taken."""

HELD_OUT = 10
"""Every tenth image of a class is held out."""

LEAST_CONTENT = 24
"""Pixels of the longer side of what is left after trimming."""

SAME = 6.0
"""Images are the same whose 16 x 16 px differ by less than this many levels of 255 on average."""


def white_square(path: Path, size: int, margin: float = 0.04) -> Image.Image | None:
    """The content of an image in the middle of a white square of `size` pixels; None where there is too little."""
    image = Image.open(path).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).point(lambda level: level > 8).getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < LEAST_CONTENT:
        return None
    content = image.crop(box)
    scale = size * (1 - 2 * margin) / max(content.size)
    width, height = (max(1, round(side * scale)) for side in content.size)
    square = Image.new("RGB", (size, size), "white")
    resized = content.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return square


def distinct(squares: list[Image.Image]) -> list[Image.Image]:
    """Those that do not look like an earlier one."""
    small = [np.asarray(square.resize((16, 16), Image.Resampling.BOX), dtype=np.float32) for square in squares]
    kept: list[int] = []
    for number, thumbnail in enumerate(small):
        if all(np.abs(thumbnail - small[other]).mean() >= SAME for other in kept):
            kept.append(number)
    return [squares[number] for number in kept]


@dataclass
class ClipartArguments:
    """Options of this script."""

    output_dir: Path = HfArg(help="Folder of `train` and `held_out`.")
    openclipart_dir: Path = HfArg(default=FOLDER, help="Folder of the package's images.")
    image_size: int = HfArg(default=96, help="Pixels each way.")


def main(args: ClipartArguments) -> None:
    if not args.openclipart_dir.is_dir():
        raise FileNotFoundError(f"there is no {args.openclipart_dir}: apt-get install openclipart-png")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a few images of the package are very large
    for name, (folders, others) in CLASSES.items():
        files = {file for folder in folders for file in (args.openclipart_dir / folder).rglob("*.png")}
        files -= {file for folder in others for file in (args.openclipart_dir / folder).rglob("*.png")}
        squares = [square for file in sorted(files) if (square := white_square(file, args.image_size))]
        chosen = distinct(squares)
        random.Random(0).shuffle(chosen)
        chosen = chosen[:MOST]
        for number, square in enumerate(chosen):
            folder = args.output_dir / ("train" if number % HELD_OUT else "held_out") / name
            folder.mkdir(parents=True, exist_ok=True)
            square.save(folder / f"{number:03}.png")
        print(f"{name}: {len(files)} files, {len(chosen)} distinct images", flush=True)


if __name__ == "__main__":
    run_script(main, ClipartArguments)
