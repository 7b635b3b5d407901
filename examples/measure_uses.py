# /// script
# requires-python = ">=3.11"
# dependencies = ["dnd-hf[eval]"]
#
# [tool.uv.sources]
# dnd-hf = { path = "..", editable = true }
# ///
"""Measures what else a trained model of words can do, each use beside an OCR engine. See docs/recipes.md.

python examples/measure_uses.py --use classify
python examples/measure_uses.py --use best_of_n
python examples/measure_uses.py --use restore --num_images 50
python examples/measure_uses.py --use stream
python examples/measure_uses.py --use keep
python examples/measure_uses.py --use larger
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE, DnDConfig, DnDForImageGeneration, DnDPipeline
from dnd_hf.bundled import checkpoint_path
from dnd_hf.command_line import run_script
from dnd_hf.data.words import CELLS, PITCH, WORDS, WordImages
from dnd_hf.evaluation.ocr import OCREngine, load_ocr_engine
from dnd_hf.evaluation.options import REAL_SEED
from dnd_hf.evaluation.text_metrics import exact_match
from dnd_hf.evaluation.words import check_classes
from dnd_hf.figures import markdown_table
from dnd_hf.pipelines.candidates import RANKS, best_candidates, candidate_scores
from dnd_hf.pipelines.inpainting import Hole, hole_of_cells, without_hole


@dataclass
class UsesArguments:
    """Options of this script."""

    use: Literal["classify", "best_of_n", "restore", "stream", "keep", "larger"] = HfArg(help="What to measure.")
    model: str = HfArg(default="words", help="A pipeline of words: a folder, a Hub id or the name of a bundled one.")
    num_images: int = HfArg(default=100, help="Images; their words go round.")
    batch_size: int = HfArg(default=100, help="Sequences that pass the model at a time.")
    seed: int = HfArg(default=0, help="Of the rendered images and of the sampling.")

    def __post_init__(self):
        if min(self.num_images, self.batch_size) < 1 or self.seed < 0:
            raise ValueError("`num_images` and `batch_size` must be at least 1, `seed` at least 0.")


Row = dict[str, Any]


def classify(pipe: DnDPipeline, engine: OCREngine, args: UsesArguments) -> list[Row]:
    """The share of freshly rendered words that are read right: by the model as a classifier, and by OCR."""
    dataset = WordImages(args.num_images, seed=REAL_SEED + args.seed)
    images = [dataset[i]["image"] for i in range(args.num_images)]
    words = [WORDS[dataset[i]["label"]] for i in range(args.num_images)]
    labels = pipe.classify(images, batch_size=args.batch_size).labels.tolist()
    return [
        {"reader": "the model, among its 100 words", "read": exact_match([WORDS[label] for label in labels], words)},
        {"reader": "rapidocr-line, any text", "read": exact_match(engine(images), words)},
    ]


def best_of_n(pipe: DnDPipeline, engine: OCREngine, args: UsesArguments) -> list[Row]:
    """The share of generated words that OCR reads right, for the best of 1, 4 and 16 candidates by each rank.

    The candidates of 4 are the first ones of 16, as in calls with `num_candidates`.
    """
    counts = (1, 4, 16)
    labels = torch.arange(args.num_images) % len(WORDS)
    scores: dict[str, list] = {name: [] for name in (*RANKS, "rapidocr-line")}
    with torch.no_grad():
        for start in tqdm(range(0, args.num_images, args.batch_size), desc="Batches"):
            part = labels[start : start + args.batch_size]
            generators = [
                torch.Generator().manual_seed(args.seed * args.num_images + start + i) for i in range(len(part))
            ]
            for _ in range(counts[-1]):
                codes = pipe(part, generator=generators, output_type="codes").images
                texts = engine(decoded(pipe, codes))
                right = torch.tensor([text.strip() == WORDS[label] for text, label in zip(texts, part.tolist())])
                scores["rapidocr-line"].append(right.float())
                for name in RANKS:
                    scores[name].append(candidate_scores(name, pipe.transformer, part, codes).cpu())
    table = {name: by_candidate(values, counts[-1]) for name, values in scores.items()}
    right_NI = table["rapidocr-line"]
    rows = []
    for name, scores_NI in table.items():
        row: Row = {"rank_by": name}
        for count in counts:
            best = best_candidates(scores_NI[:count].flatten(), count)
            row[f"N = {count}"] = right_NI[:count].flatten()[best].mean().item()
        rows.append(row)
    return rows


def by_candidate(values: list[torch.Tensor], count: int) -> torch.Tensor:
    """Values of batches, each `count` times in a row, as `(count, images)`."""
    return torch.cat([torch.stack(values[start : start + count]) for start in range(0, len(values), count)], dim=1)


def restore(pipe: DnDPipeline, engine: OCREngine, args: UsesArguments) -> list[Row]:
    """The share of words that OCR reads right after one of their letters was hidden and filled in.

    Rendered images are filled in by the pipeline, whose ring of cells around the letter is sampled too; the model is
    told the word, or not (guidance 0 is the null class). Of images that the model made, the codes themselves are given.
    """
    dataset = WordImages(args.num_images, seed=REAL_SEED + args.seed)
    images = [dataset[i]["image"] for i in range(args.num_images)]
    labels = [dataset[i]["label"] for i in range(args.num_images)]
    words = [WORDS[label] for label in labels]
    rng = np.random.default_rng(args.seed)
    masks = [letter_mask(image, int(rng.integers(len(word)))) for image, word in zip(images, words)]
    before = exact_match(engine(images), words)
    own, own_kept = own_images(pipe, labels, rng, args)
    own_before = exact_match(engine(decoded(pipe, own)), words)
    rows: list[Row] = [
        {"particles": "images before", "word not told": before, "word told": before, "own images, not told": own_before}
    ]
    for num_particles in (1, 4, 16):
        row: Row = {"particles": str(num_particles)}
        for name, guidance_scale in (("word not told", 0.0), ("word told", 1.0)):
            filled: list[Image.Image] = []
            size = max(1, args.batch_size // num_particles)
            for start in tqdm(range(0, args.num_images, size), desc=f"{num_particles} particles, {name}"):
                part = slice(start, start + size)
                filled += pipe(
                    labels[part],
                    guidance_scale=guidance_scale,
                    temperature=1.0,
                    generator=list(range(args.num_images))[part],
                    image=images[part],
                    mask_image=masks[part],
                    num_particles=num_particles,
                ).images
            row[name] = exact_match(engine(filled), words)
        codes = [
            pipe.transformer.inpaint(
                [0] * len(given), given, kept, num_particles, generator=args.seed, guidance_scale=0.0, temperature=1.0
            )
            for given, kept in zip(own.split(size), own_kept.split(size))
        ]
        row["own images, not told"] = exact_match(engine(decoded(pipe, torch.cat(codes))), words)
        rows.append(row)
    return rows


def own_images(
    pipe: DnDPipeline, labels: list[int], rng: np.random.Generator, args: UsesArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of generated words, and where they are kept: not at one letter."""
    options = dict(generator=args.seed, guidance_scale=1.0, temperature=1.0, output_type="codes")
    codes = torch.cat([pipe(part.tolist(), **options).images for part in torch.tensor(labels).split(args.batch_size)])
    stride = pipe.vqvae.code_stride
    kept = []
    for image, label in zip(decoded(pipe, codes), labels):
        white = np.asarray(letter_mask(image, int(rng.integers(len(WORDS[label])))))
        kept.append(torch.from_numpy(white[:: stride[0], :: stride[1]] == 0))
    return codes, torch.stack(kept).to(codes.device)[..., None].expand(codes.shape)


@torch.no_grad()
def decoded(pipe: DnDPipeline, codes: torch.Tensor) -> list[Image.Image]:
    """The images of codes."""
    return pipe.image_processor.postprocess(pipe.vqvae.decode_codes(codes).sample)


def letter_mask(image: Image.Image, letter: int) -> Image.Image:
    """White over the cells of one letter of a rendered word."""
    colours = np.asarray(image).astype(int)
    ink = np.abs(colours - colours[0, 0]).max(-1) > 32
    cell = image.height // CELLS
    left = (int(ink.any(0).argmax()) // cell + PITCH * letter) * cell
    white = np.zeros(ink.shape, dtype=np.uint8)
    white[:, left : left + PITCH * cell] = 255
    return Image.fromarray(white)


def stream(pipe: DnDPipeline, engine: OCREngine, args: UsesArguments) -> list[Row]:
    """How soon the first row of an image is there, for the model and for an untrained one with 16 rows."""
    transformer = DnDForImageGeneration(
        DnDConfig(vocab_size=512, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, num_classes=10)
    )
    vqvae = RQVAE(block_out_channels=(32, 32, 64, 64), latent_channels=64, num_vq_embeddings=512, sample_size=128)
    untrained = DnDPipeline(transformer.eval(), vqvae.eval()).to(pipe.device)
    rows = []
    for name, measured in ((args.model, pipe), ("untrained, 128x128 pixels", untrained)):
        measured.set_progress_bar_config(disable=True)
        list(measured.stream(0))  # warm
        start = time.perf_counter()
        times = [time.perf_counter() - start for _ in measured.stream(0, generator=args.seed)]
        height, width = measured.transformer.config.grid_size
        shares = {"seconds": times[-1], "first row after": times[0] / times[-1]}
        rows.append({"model": name, "grid": f"{height}x{width}", **shares})
    return rows


@torch.no_grad()
def keep(pipe: DnDPipeline, engine: OCREngine, args: UsesArguments) -> list[Row]:
    """How many of the kept codes are those of the whole image, where half of it is hidden, by what the encoder gets.

    The first codes of the cells count that are kept, a ring of one cell around the hole is not.
    """
    pixels = rendered_pixels(args.num_images, args.seed).to(pipe.device)
    codes = pipe.vqvae.encode(pixels).codes
    rows = []
    for name, part in (("right", np.s_[..., pixels.shape[3] // 2 :]), ("lower", np.s_[..., pixels.shape[2] // 2 :, :])):
        mask = torch.zeros_like(pixels[:, :1], dtype=torch.bool)
        mask[part] = True
        cells = hole_of_cells(mask, pipe.vqvae.code_stride, ring=1)
        kept = Hole(pixels, mask, cells, pipe.vqvae.code_stride, feather=0).encoded(
            lambda x: pipe.vqvae.encode(x).codes
        )
        filled = pipe.vqvae.encode(without_hole(pixels, mask)).codes
        same = {"kept part by itself": kept, "hole of the mean colour": filled}
        shares = {how: (one == codes)[..., 0][~cells].float().mean().item() for how, one in same.items()}
        rows.append({"hidden half": name, **shares})
    return rows


@torch.no_grad()
def larger(pipe: DnDPipeline, engine: OCREngine, args: UsesArguments) -> list[Row]:
    """The PSNR (pixels in [-1, 1]) of images of two rendered words from the codes of each, whole and in tiles."""
    words = rendered_pixels(2 * args.num_images, args.seed).to(pipe.device)
    codes = pipe.vqvae.encode(words).codes
    rows = []
    for name, axis in (("one below the other", 0), ("side by side", 1)):
        pixels = torch.cat(words.chunk(2), dim=2 + axis)
        both = torch.cat(codes.chunk(2), dim=1 + axis)
        row: Row = {"two words": name}
        for how, tiled in (("decoded whole", False), ("decoded in tiles", True)):
            sample = pipe.vqvae.decode_codes(both, tiled=tiled).sample.clamp(-1, 1)
            row[how] = (10 * torch.log10(4 / (sample - pixels).square().mean((1, 2, 3)))).mean().item()
        rows.append(row)
    return rows


def rendered_pixels(count: int, seed: int) -> torch.Tensor:
    """Freshly rendered words, `(count, 3, H, W)` in [-1, 1]."""
    dataset = WordImages(count, seed=REAL_SEED + seed)
    pixels = np.stack([np.asarray(dataset[i]["image"].convert("RGB")) for i in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


USES: dict[str, Callable[[DnDPipeline, OCREngine, UsesArguments], list[Row]]] = {
    "classify": classify,
    "best_of_n": best_of_n,
    "restore": restore,
    "stream": stream,
    "keep": keep,
    "larger": larger,
}


def main(args: UsesArguments) -> None:
    engine = load_ocr_engine("rapidocr-line")
    pipe = DnDPipeline.from_pretrained(checkpoint_path(args.model))
    check_classes(args.model, pipe.transformer.config.id2label)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=args.use != "classify")
    print(markdown_table(USES[args.use](pipe, engine, args)))


if __name__ == "__main__":
    run_script(main, UsesArguments)
