"""The suite trained: images of a trained pipeline, one by one, and what they are worth, beside the official code."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from decode import counted_passes, decode_floors, decoding_modes
from official import Reference
from options import BenchmarkArguments
from timing import row, timed
from torch import Tensor

from dnd_hf import DnDPipeline
from dnd_hf.bundled import checkpoint_path
from dnd_hf.data.images import to_images
from dnd_hf.data.text import load_texts
from dnd_hf.evaluation.glyphs import GlyphReader
from dnd_hf.evaluation.reference_text import ReferenceText, compare_with_reference
from dnd_hf.generation.settings import SamplingSettings
from dnd_hf.training.throughput import synchronize


def trained(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """Images of a pipeline at its own sampling settings, float32, batch 1: a row for each of `positions_per_pass`.

    Ours and the official code make image i in turns: ours from seed i, so that all widths should give equal codes; the
    official code from other random numbers of the same distribution. `different` counts images whose codes are not
    those of the first width, `times_first` is the median over images of its time over the one of this row.
    """
    pipeline = DnDPipeline.from_pretrained(checkpoint_path(args.pipeline), dtype=torch.float32).to(device)
    model = pipeline.transformer.eval()
    model.cuda_graphs, model.cpu_kernels = decoding_modes(args, device)
    chosen = dict(temperature=args.trained_temperature, guidance_scale=args.trained_guidance_scale)
    chosen = {name: value for name, value in chosen.items() if value is not None}
    settings = SamplingSettings.resolve(model.config, model.generation_config, **chosen)
    functions: dict[str, Callable[[int], Tensor | None]] = {
        str(width): partial(generate_one, model, positions_per_pass=width, **chosen) for width in args.widths
    }
    floors = decode_floors(model, 2 if settings.guided else 1, args.repeats)
    functions |= {name: partial(call_without, floor) for name, floor in floors.items()}
    if reference is not None:
        functions["reference"] = official_generate(reference, model, settings)
    seconds, codes, passes = in_turns(functions, args.trained_images, device)

    quality = word_rates(pipeline, args.training_text)
    official = quality(codes["reference"]) if reference is not None else {}
    first = str(args.widths[0])
    others = {name: times for name, times in seconds.items() if name not in args.positions_per_pass}
    what = f"{Path(args.pipeline).name}, guidance {settings.guidance_scale:g}, temperature {settings.temperature[0]:g}"
    what += ", compiled kernels" * model.cpu_kernels
    for width in args.widths:
        name = str(width)
        yield row(
            "trained",
            f"{what}, {width} per pass",
            "images/s",
            1,
            {"ours": seconds[name], **others},
            passes=passes[name] / args.trained_images,
            times_first=median(a / b for a, b in zip(seconds[first], seconds[name])),
            different=sum(not torch.equal(*pair) for pair in zip(codes[first], codes[name])),
            first_row_s=median(
                first_frame(pipeline, device, generator=seed, positions_per_pass=width, **chosen) for seed in range(5)
            ),
            **quality(codes[name]),
            **{f"official_{metric}": value for metric, value in official.items()},
        )


def in_turns(
    functions: dict[str, Callable[[int], Tensor | None]], images: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[Tensor | None]], dict[str, int]]:
    """Of each function, called with 0, 1, ... after a call that does not count: seconds and codes of each image, and
    the passes of all. The functions take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    codes: dict[str, list[Tensor | None]] = {name: [] for name in functions}
    passes = dict.fromkeys(functions, 0)
    for function in functions.values():
        function(0)
    for index in range(images):
        for name, function in functions.items():
            with counted_passes() as counted:
                synchronize(device)
                started = time.perf_counter()
                codes[name].append(function(index))
                synchronize(device)
                seconds[name].append(time.perf_counter() - started)
            passes[name] += len(counted)
    return seconds, codes, passes


def call_without(floor: Callable[[], None], index: int) -> None:
    floor()


def generate_one(model, index: int, **options) -> Tensor:
    """The codes of image `index`, of the class of that number, from its seed."""
    return model.generate(index % model.config.num_classes, generator=index, **options)


def official_generate(reference: Reference, model, settings: SamplingSettings) -> Callable[[int], Tensor]:
    """The same by the official code, with the weights and the sampling settings of ours.

    Raises:
        ValueError: settings that it does not have.
    """
    values = {name: set(getattr(settings, name)) for name in ("temperature", "top_k", "top_p")}
    if settings.guidance_schedule != "constant" or max(map(len, values.values())) > 1:
        raise ValueError("the official code has no guidance schedules and no settings per depth.")
    config, official = model.config, reference.transformer(model).to(model.device)

    def generate(index: int) -> Tensor:
        torch.manual_seed(index)
        codes = reference.generate(
            official, torch.tensor([index % config.num_classes], device=model.device), config.sequence_length,
            num_prediction_heads=config.code_depth, cfg_scale=settings.guidance_scale, sample_logits=settings.do_sample,
            **{name: min(value) for name, value in values.items()},
        )  # fmt: skip
        return codes.long().view(1, *config.grid_size, config.code_depth)

    return generate


def first_frame(pipeline: DnDPipeline, device: torch.device, **options) -> float:
    """Seconds to the first image of `stream`, which has the first row of the grid."""
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline.stream(0, **options)
    seconds = timed(lambda: next(frames), device)
    frames.close()
    return seconds


def word_rates(pipeline: DnDPipeline, training_text: str | None) -> Callable[[list[Tensor]], dict[str, float]]:
    """What makes of codes the share of the words of their pages that the training text has; {} without a text."""
    if training_text is None:
        return lambda codes: {}
    texts = [text for _, text in load_texts(training_text)]
    characters = {character for text in texts for character in text if not character.isspace()}
    reader, known = GlyphReader("".join(sorted(characters))), ReferenceText(texts)

    def measure(codes: list[Tensor]) -> dict[str, float]:
        with torch.no_grad():
            pages = [image for one in codes for image in to_images(pipeline.vqvae.decode_codes(one).sample)]
        return {"word_rate": compare_with_reference(reader(pages), known)["vocabulary_rate"]}

    return measure
