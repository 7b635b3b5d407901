"""From conditions to codes, and from codes to images: the steps of a call behind the checks of its arguments."""

from typing import Any

from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import PreTrainedModel

from ..generation.windows import checked_positions_per_pass
from .inpainting import Hole
from .outpainting import Canvas, say_that_it_is_larger
from .user_images import encoded


OUTPUT_TYPES = ("pil", "np", "pt", "codes")


def check_output_type(output_type: str, has_vqvae: bool) -> None:
    """Raises a ValueError for an unknown type, or for images where only codes can be made."""
    allowed = OUTPUT_TYPES if has_vqvae else ("codes",)
    if output_type not in allowed:
        without = "" if has_vqvae else " of a pipeline without a `vqvae`"
        raise ValueError(f"`output_type`{without} must be one of {allowed}, got {output_type!r}.")


def check_positions_per_pass(value: int | str, num_particles: int, transformer: PreTrainedModel) -> None:
    """Raises a ValueError for another value than `generate` takes, or for several positions with particles."""
    checked_positions_per_pass(value, transformer.config.sequence_length)
    if num_particles > 1 and value not in ("auto", 1):
        raise ValueError(
            f'`positions_per_pass` must be "auto" or 1 with particles, which go position by position, got {value}.'
        )


def sample_codes(
    transformer: PreTrainedModel,
    vqvae: ModelMixin | None,
    conditions: Tensor,
    canvas: Canvas,
    hole: Hole | None,
    num_particles: int,
    positions_per_pass: int | str,
    **settings: Any,
) -> Tensor:
    """Codes `(n, height, width, depth)` of images, one for each condition.

    Args:
        conditions: on the device of the sampling; k times those of all images of the hole.
        hole: what is around it keeps its codes.
        positions_per_pass: as in `generate`; particles go position by position.
        settings: of the sampling, with `generator` and `callback`, as in `generate`.
    """
    given = {}
    if hole is not None:
        codes = hole.encoded(lambda pixels: encoded(vqvae, pixels, conditions.device, tiled=_tiled(canvas)))
        codes_mask = hole.codes_mask(codes.shape[-1]).to(codes.device)
        times = len(conditions) // len(codes)
        given = dict(codes=codes.repeat(times, 1, 1, 1), codes_mask=codes_mask.repeat(times, 1, 1, 1))
    if num_particles == 1:
        settings["positions_per_pass"] = positions_per_pass
    if canvas.larger:
        say_that_it_is_larger(canvas, tuple(transformer.config.grid_size))
        windows = dict(grid_size=canvas.grid_size, overlap=canvas.overlap, num_particles=num_particles)
        return transformer.outpaint(conditions, **windows, **given, **settings)
    if num_particles == 1:
        return transformer.generate(conditions, **given, **settings)
    return transformer.inpaint(conditions, **given, num_particles=num_particles, **settings)


def decoded(
    vqvae: ModelMixin,
    image_processor: VaeImageProcessor,
    codes: Tensor,
    canvas: Canvas,
    hole: Hole | None,
    output_type: str,
) -> Any:
    """The images of codes, with the user's pixels around a hole.

    Larger images than the model's are decoded in tiles of its size, which are blended where they overlap: the decoder's
    group norms and its attention have learnt from images of that size.
    """
    sample = vqvae.decode_codes(codes, tiled=_tiled(canvas)).sample
    if hole is not None:
        sample = hole.composited(sample)
    return image_processor.postprocess(sample, output_type=output_type)


def _tiled(canvas: Canvas) -> bool | None:
    return True if canvas.larger else None
