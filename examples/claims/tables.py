"""The tables and plots of a claim, from the results.json of its runs; read by run.py.

A claim's YAML file says under `table` and `table_of_images` which metrics are shown, under `plot` what is drawn, under
`samples` of which temperature or sampler images are shown, and under `tokenizers` what bounds them.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from PIL import Image

from dnd_hf.figures import import_figure, markdown_table, save_image_grid


TOKENIZER_COLUMNS = {
    "psnr": "PSNR, dB",
    "wrong_letters": "letters that differ",
    "vocabulary_rate@reconstructions": "words of the text",
    "vocabulary_rate@real": "words of the text, originals",
    "ppl@reconstructions": "PPL_OCR",
    "ppl@real": "PPL_OCR, originals",
    "shuffled_ppl@real": "originals, words shuffled",
}


def results_of(state_dir: Path, files: dict[str, list[Path]]) -> dict[str, list[dict]]:
    """The results of each variant's folders that have any, with the perplexities of its texts: one dict a folder."""
    texts: dict[str, dict] = {}
    for file in sorted(state_dir.glob("C*/perplexity*/results.json")):
        for folder, metrics in json.loads(file.read_text()).items():
            texts[folder] = texts.get(folder, {}) | metrics

    def read(file: Path) -> dict:
        return json.loads(file.read_text()) | texts.get(str(file.parent.relative_to(state_dir)), {})

    return {name: [read(file) for file in found] for name, found in files.items() if found}


def mean_and_spread(values: list[float], digits: int = 4) -> str:
    """`mean ± standard deviation`; of one value the value, of values that are all equal that one."""
    mean = statistics.mean(values)
    shown = f"{mean:,.0f}" if abs(mean) >= 10**digits else f"{mean:.{digits}g}"
    return shown if len(set(values)) < 2 else f"{shown} ± {statistics.stdev(values):.2g}"


def table(results: dict[str, list[dict]], columns: dict[str, str]) -> str:
    """A row for each variant; `columns`: metric -> heading. A metric that no variant has is left out."""
    rows = []
    for variant, seeds in results.items():
        row: dict = {"": variant.rpartition("/")[2], "seeds": len(seeds)}
        for metric, heading in columns.items():
            values = [one[metric] for one in seeds if one.get(metric) is not None]
            row[heading] = mean_and_spread(values) if values else None
        rows.append(row)
    return markdown_table(rows)


def table_of_images(results: dict[str, list[dict]], columns: dict[str, str]) -> str:
    """A row for each variant and each kind of images in it, such as those of a temperature: `METRIC@KIND`."""
    split: dict[str, list[dict]] = {}
    for variant, seeds in results.items():
        kinds = dict.fromkeys(name.partition("@")[2] for one in seeds for name in one if "@" in name)
        for kind in kinds:
            of_kind = [
                {name.partition("@")[0]: one[name] for name in one if name.endswith(f"@{kind}")} for one in seeds
            ]
            split[f"{variant} {kind}"] = of_kind
    return table(split, columns)


def show(claim: str, plan: dict, state_dir: Path) -> None:
    """Prints the tables of a claim; they are in CLAIM.md of the state folder, plot and samples in CLAIM*.png."""
    variants = list(plan["variants"])
    tokenizers = {name: sorted(state_dir.glob(f"{name}/results.json")) for name in plan.get("tokenizers", [])}
    runs = {name: sorted(state_dir.glob(f"{name}/*-measured/results.json")) for name in variants}
    bounds, results = results_of(state_dir, tokenizers), results_of(state_dir, runs)
    parts = [table(bounds, TOKENIZER_COLUMNS)] if bounds else []
    if results:
        parts.append(table(results, plan["table"]))
        if "table_of_images" in plan:
            parts.append(table_of_images(results, plan["table_of_images"]))
        if "plot" in plan:
            plot(results, plan["plot"], state_dir / f"{claim}.png")
    save_samples(variants, plan["samples"], state_dir, state_dir / f"{claim}_samples.png")
    text = "\n\n".join(parts) or f"{claim}: nothing is measured yet."
    (state_dir / f"{claim}.md").write_text(text + "\n")
    print(text)


def save_samples(variants: list[str], kinds: list[str], state_dir: Path, path: Path, columns: int = 6) -> None:
    """Writes a row for each variant that has samples of one of the kinds: the first ones of its first seed."""
    images = []
    for variant in variants:
        folders = [
            folder for kind in kinds for folder in sorted(state_dir.glob(f"{variant}/*-measured/samples/{kind}"))
        ]
        images += [Image.open(file) for folder in folders[:1] for file in sorted(folder.glob("*.png"))[:columns]]
    if images:
        save_image_grid(images, columns, path)


def plot(results: dict[str, list[dict]], panels: list[str], path: Path) -> None:
    """A panel for each metric of the plan: a bar for each variant, a dot for each seed.

    A metric `nats_depth` is the stack of all `nats_depth_k`; `METRIC@` is a line over all temperatures.
    """
    figure = import_figure()(figsize=(5.5 * len(panels), 3.8), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        if metric.endswith("@"):
            _lines(axes, results, metric)
        elif metric == "nats_depth":
            _stack(axes, results)
        else:
            _bars(axes, results, metric)
        axes.set_title(metric.rstrip("@").replace("_", " "), fontsize=10)
        axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=110)


def _names(axes, results: dict[str, list[dict]]) -> list[int]:
    places = list(range(len(results)))
    axes.set_xticks(places, [name.rpartition("/")[2] for name in results], rotation=30, ha="right")
    return places


def _bars(axes, results: dict[str, list[dict]], metric: str) -> None:
    for place, seeds in zip(_names(axes, results), results.values(), strict=True):
        values = [one[metric] for one in seeds if one.get(metric) is not None]
        if values:
            axes.bar(place, statistics.mean(values), color="#8fb3d9")
            axes.plot([place] * len(values), values, "k.", markersize=5)


def _stack(axes, results: dict[str, list[dict]]) -> None:
    bottoms = [0.0] * len(results)
    places, depth = _names(axes, results), 1
    while any(f"nats_depth_{depth}" in seeds[0] for seeds in results.values()):
        means = [statistics.mean(one.get(f"nats_depth_{depth}", 0.0) for one in seeds) for seeds in results.values()]
        axes.bar(places, means, bottom=bottoms, label=f"depth {depth}")
        bottoms = [low + mean for low, mean in zip(bottoms, means, strict=True)]
        depth += 1
    axes.legend(fontsize=8)
    axes.set_ylabel("held-out nats an image")


def _lines(axes, results: dict[str, list[dict]], metric: str) -> None:
    for variant, seeds in results.items():
        points = defaultdict(list)
        for one in seeds:
            for name, value in one.items():
                if name.startswith(metric) and _is_number(name[len(metric) :]):
                    points[float(name[len(metric) :])].append(value)
        if points:
            places = sorted(points)
            means = [statistics.mean(points[place]) for place in places]
            axes.plot(places, means, marker="o", label=variant.rpartition("/")[2])
            axes.legend(fontsize=8)
    axes.set_xlabel("temperature")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
