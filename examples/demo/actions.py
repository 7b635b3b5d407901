"""What the page does with a pipeline: make an image, look inside, fill a part, read an upload. No page in here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dnd_hf import DnDPipeline
from dnd_hf.pipelines.likelihood import ImageClasses, ImageScores
from dnd_hf.pipelines.prompts import prompt_tokens

from .models import image_size, reads_text


@dataclass(frozen=True)
class Look:
    """An image, its codes, and what the model expected at each of them (temperature 1, no guidance).

    Args:
        image: as the codes are decoded.
        stride: pixels of a cell, (rows, columns).
        codes, entropies, probabilities: `(height, width, depth)`; entropies in nats.
        top_codes, top_probabilities: `(height, width, depth, n)`, the likeliest first.
        vocab_size: codes to choose from.
    """

    image: Image.Image
    stride: tuple[int, int]
    codes: np.ndarray
    entropies: np.ndarray
    probabilities: np.ndarray
    top_codes: np.ndarray
    top_probabilities: np.ndarray
    vocab_size: int


@dataclass(frozen=True)
class Reading:
    """What the model says of an image: its reconstructions with 1, 2, ... codes a cell, scores and classes."""

    look: Look
    reconstructions: list[Image.Image]
    scores: ImageScores
    classes: ImageClasses | None


def condition_of(pipe: DnDPipeline, label: int | None, prompt: str) -> dict[str, Any]:
    """The keyword that tells the pipeline what to make: a prompt, a label, or nothing where there is one class.

    Raises:
        ValueError: an empty prompt.
    """
    if reads_text(pipe):
        if not prompt or not prompt.strip():
            raise ValueError("Write a prompt first.")
        return {"prompt": prompt}
    return {"class_labels": 0 if label is None and pipe.transformer.config.num_classes == 1 else label}


def sampling_settings(guidance_scale: float | None, table: list[list]) -> dict[str, Any]:
    """Keywords of a call, from rows of (depth, temperature, top-k, top-p).

    Raises:
        ValueError: a cell of the table is no number.
    """
    settings: dict[str, Any] = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    for column, name in enumerate(("temperature", "top_k", "top_p"), start=1):
        try:
            settings[name] = [float(row[column]) for row in table]
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{name}` must be a number for each depth.") from error
    return settings


def generate(
    pipe: DnDPipeline,
    condition: dict[str, Any],
    seed: int,
    settings: dict[str, Any],
    by: str = "rows",
    num_candidates: int = 1,
    rank_by: str = "likelihood",
    on_step: Callable[[int], None] = lambda step: None,
) -> Iterator[tuple[Image.Image, Tensor | None]]:
    """Makes one image and yields it while it comes; in the end with its codes `(1, height, width, depth)`.

    Several candidates are compared when they are finished, so there is one frame then.
    """
    if num_candidates > 1:
        call = dict(num_candidates=num_candidates, rank_by=rank_by, output_type="codes", generator=seed)
        codes = pipe(**condition, **call, **settings, callback_on_step_end=lambda _, step, *__: on_step(step)).images
        yield decoded(pipe, codes), codes
        return
    newest: dict[str, Tensor] = {}
    call = dict(by=by, generator=seed, callback_on_step_end=lambda _, __, ___, tensors: newest.update(tensors))
    for frame in pipe.stream(**condition, **call, **settings):
        yield frame, None
    yield frame, newest["codes"]


@torch.no_grad()
def decoded(pipe: DnDPipeline, codes: Tensor, depth: int | None = None) -> Image.Image:
    """The image of codes `(1, height, width, depth)`, of the first `depth` of each cell."""
    sample = pipe.vqvae.decode_codes(codes, depth=depth).sample
    return pipe.image_processor.postprocess(sample, output_type="pil")[0]


def coarse_to_fine(pipe: DnDPipeline, codes: Tensor) -> list[Image.Image]:
    """The images of the first code of each cell, of the first two, and so on."""
    return [decoded(pipe, codes, depth) for depth in range(1, codes.shape[-1] + 1)]


def look_inside(pipe: DnDPipeline, condition: dict[str, Any], codes: Tensor, num_top_codes: int = 5) -> Look:
    """What the model expected at each of the codes `(1, height, width, depth)`; no condition: that of no label."""
    if "prompt" in condition:
        length = pipe.transformer.config.prompt_length
        labels = prompt_tokens(pipe.tokenizer, condition["prompt"], length)
    elif condition.get("class_labels") is None:
        labels = None
    else:
        labels = [condition["class_labels"]]
    vocab_size = pipe.transformer.config.vocab_size
    found = pipe.transformer.code_distributions(labels, codes, num_top_codes=min(num_top_codes, vocab_size))
    return Look(
        image=decoded(pipe, codes),
        stride=tuple(pipe.vqvae.code_stride),
        codes=codes[0].cpu().numpy(),
        entropies=found.entropies[0].cpu().numpy(),
        probabilities=found.log_probs[0].exp().cpu().numpy(),
        top_codes=found.top_codes[0].cpu().numpy(),
        top_probabilities=found.top_log_probs[0].exp().cpu().numpy(),
        vocab_size=vocab_size,
    )


def fill_in(
    pipe: DnDPipeline,
    condition: dict[str, Any],
    image: Image.Image,
    mask: Image.Image,
    seed: int,
    settings: dict[str, Any],
    num_particles: int,
    feather: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> Image.Image:
    """The image, its masked part made anew; see `DnDPipeline.__call__`."""
    given = dict(image=image, mask_image=mask, num_particles=num_particles, feather=feather, generator=seed)
    return pipe(**condition, **given, **settings, callback_on_step_end=lambda _, step, *__: on_step(step)).images[0]


@torch.no_grad()
def read(pipe: DnDPipeline, image: Image.Image, condition: dict[str, Any], classify: bool) -> Reading:
    """Encodes an image of the model's size and says how probable it is, and of which class.

    Raises:
        ValueError: another size; no condition, where the model needs one.
    """
    height, width = image_size(pipe)
    if image.size != (width, height):
        raise ValueError(f"The image must be {width}×{height} pixels, got {image.width}×{image.height}.")
    scores = pipe.score(image, **condition)
    pixels = pipe.image_processor.preprocess(image).to(pipe.vqvae.device, pipe.vqvae.dtype)
    codes = pipe.vqvae.encode(pixels).codes
    classes = pipe.classify(image) if classify else None
    return Reading(look_inside(pipe, condition, codes), coarse_to_fine(pipe, codes), scores, classes)
