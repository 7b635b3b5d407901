"""The plot of a claim, and a figure of images, from the results and samples of its runs; called by tables.py."""

import math
import statistics
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from dnd_hf.data.images import ImageTransform, to_images
from dnd_hf.data.sources import load_image_dataset
from dnd_hf.figures import import_figure


Results = dict[str, list[dict]]
"""Variant -> the metrics of each of its seeds."""

NUM_IMAGES = 8
"""Images in a row of the figure: those of the seeds 0 to 7."""

GAP, TITLE_HEIGHT = 4, 20
"""Pixels between images, and above a row."""


def short(name: str) -> str:
    """What a table or plot calls a variant: its name without the claim's."""
    return name.rpartition("/")[2]


def save_rows(rows: dict[str, list[Image.Image]], path: Path) -> None:
    """Writes images of one size as they are, a row for each title."""
    width, height = next(iter(rows.values()))[0].size
    columns = max(len(images) for images in rows.values())
    row_height = TITLE_HEIGHT + height + GAP
    figure = Image.new("RGB", (columns * (width + GAP) + GAP, len(rows) * row_height + GAP), "#d8dde3")
    draw, font = ImageDraw.Draw(figure), ImageFont.load_default(13)
    for row, (title, images) in enumerate(rows.items()):
        draw.text((GAP, row * row_height + TITLE_HEIGHT // 2 + 1), title, "black", font, "lm")
        for column, image in enumerate(images):
            figure.paste(image.convert("RGB"), (GAP + column * (width + GAP), row * row_height + TITLE_HEIGHT))
    figure.save(path, optimize=True)


def real_images(dataset_name: Path, size: tuple[int, int]) -> list[Image.Image]:
    """Images of `size` (width, height) that are spread evenly over a data set; none where it is not there."""
    if not dataset_name.exists():
        return []
    dataset = load_image_dataset(str(dataset_name), ImageTransform(size[::-1]), label_column=None)
    indices = range(0, len(dataset), max(1, len(dataset) // NUM_IMAGES))[:NUM_IMAGES]
    return to_images(torch.stack([dataset[i]["pixel_values"] for i in indices]))


def sampled_images(state_dir: Path, variant: str, kind: str) -> list[Image.Image]:
    """The first samples of a kind, such as those of a temperature, of the variant's first seed that has any."""
    folders = sorted(state_dir.glob(f"{variant}/*-measured/samples/{kind}"))
    return [Image.open(file) for folder in folders[:1] for file in sorted(folder.glob("*.png"))[:NUM_IMAGES]]


def values(seeds: list[dict], metric: str) -> list[float]:
    """A metric of each seed that has it; it is not a number where there was nothing to measure."""
    return [one[metric] for one in seeds if one.get(metric) is not None and not math.isnan(one[metric])]


def plot(results: Results, bounds: Results, panels: dict[str, str], path: Path) -> None:
    """A panel for each metric of the plan under its title: a bar for each variant, a dot for each seed.

    A metric `nats_depth` is the stack of all `nats_depth_k`; `METRIC@` is a line over the temperatures, with the value
    of the real images beside it; `nats_a_code_depth` is a line over the depths, beside `entropy_depth`. What no variant
    has is left out.
    """
    known = {name for seeds in [*results.values(), *bounds.values()] for one in seeds for name in one}
    panels = {metric: title for metric, title in panels.items() if any(name.startswith(metric) for name in known)}
    if not panels:
        return
    figure = import_figure()(figsize=(5 * len(panels), 3.8), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3, axis="y")
        if metric.endswith("@"):
            _over_temperature(axes, results, bounds, metric)
        elif metric == "nats_depth":
            _stack(axes, results)
        elif metric == "nats_a_code_depth":
            _over_depth(axes, results)
        else:
            _bars(axes, results, metric)
    figure.savefig(path, dpi=110)


def _names(axes, results: Results) -> list[int]:
    places = list(range(len(results)))
    axes.set_xticks(places, [short(name) for name in results], rotation=30, ha="right")
    return places


def _bars(axes, results: Results, metric: str) -> None:
    for place, seeds in zip(_names(axes, results), results.values(), strict=True):
        of_seeds = values(seeds, metric)
        if of_seeds:
            axes.bar(place, statistics.mean(of_seeds), color="#8fb3d9")
            axes.plot([place] * len(of_seeds), of_seeds, "k.", markersize=5)


def _stack(axes, results: Results) -> None:
    bottoms = [0.0] * len(results)
    places, depth = _names(axes, results), 1
    while any(f"nats_depth_{depth}" in seeds[0] for seeds in results.values()):
        means = [statistics.mean(one.get(f"nats_depth_{depth}", 0.0) for one in seeds) for seeds in results.values()]
        axes.bar(places, means, bottom=bottoms, label=f"depth {depth}")
        bottoms = [low + mean for low, mean in zip(bottoms, means, strict=True)]
        depth += 1
    axes.margins(y=0.15)
    axes.legend(fontsize=8, ncols=4, loc="upper left")


def _over_depth(axes, results: Results) -> None:
    for number, (variant, seeds) in enumerate(results.items()):
        for metric, style, meaning in (("nats_a_code", "o-", "held-out nats"), ("entropy", "s--", "entropy")):
            depths = range(1, 1 + sum(name.startswith(f"{metric}_depth_") for name in seeds[0]))
            means = [statistics.mean(values(seeds, f"{metric}_depth_{depth}")) for depth in depths]
            axes.plot(depths, means, style, color=f"C{number}", label=f"{short(variant)}, {meaning}")
    axes.set_xlabel("depth of the code")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.update_datalim([(1, 0)])
    axes.autoscale_view()
    axes.legend(fontsize=8)


def _over_temperature(axes, results: Results, bounds: Results, metric: str) -> None:
    for variant, seeds in results.items():
        points = {}
        for name in {name for one in seeds for name in one if name.startswith(metric)}:
            of_seeds, temperature = values(seeds, name), name.removeprefix(metric)
            if of_seeds and _is_number(temperature):
                points[float(temperature)] = statistics.mean(of_seeds)
        if points:
            places = sorted(points)
            axes.plot(places, [points[place] for place in places], marker="o", label=short(variant))
    real = [value for seeds in bounds.values() for value in values(seeds, f"{metric}real")]
    if real:
        axes.axhline(statistics.mean(real), color="black", linestyle="--", label="held-out pages")
    if metric.startswith("ppl"):
        axes.set_yscale("log", subs=[2, 5])
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("{x:,.0f}")
    axes.legend(fontsize=8)
    axes.set_xlabel("temperature")


def kind_title(kind: str) -> str:
    """What a row of images is called: a temperature, temperatures by depth, or the name of a sampler."""
    return f"temperature {kind}" if all(map(_is_number, kind.split(","))) else kind


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
