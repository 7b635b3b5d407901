"""The tables and figures of a claim, from the results.json of its runs; read by run.py.

A claim's YAML file says what is shown: under `table` and `table_of_images` which metrics, under `best` by which of them
the best temperature or sampler of a variant is taken, under `plot` what plots.py draws, under `samples` of which
temperatures or samplers images are shown (default: of the best), under `real_images` beside which real ones, under
`tokenizers` what bounds them, and under `learning_rates` where best_learning_rate.py has chosen.
"""

import json
import math
import statistics
from pathlib import Path

from plots import Results, kind_title, plot, real_images, sampled_images, save_rows, short, values

from dnd_hf.figures import markdown_table


TOKENIZER_COLUMNS = {
    "psnr": "PSNR, dB",
    "wrong_letters": "letters that differ",
    "vocabulary_rate@reconstructions": "words of the text",
    "vocabulary_rate@real": "words of the text, originals",
    "ppl@reconstructions": "PPL_OCR",
    "ppl@real": "PPL_OCR, originals",
    "shuffled_ppl@real": "originals, words shuffled",
}


def results_of(state_dir: Path, files: dict[str, list[Path]]) -> Results:
    """The results of each variant's folders that have any, with the perplexities of its texts: one dict a folder."""
    texts: dict[str, dict] = {}
    for file in sorted(state_dir.glob("C*/perplexity*/results.json")):
        for folder, metrics in json.loads(file.read_text()).items():
            texts[folder] = texts.get(folder, {}) | metrics

    def read(file: Path) -> dict:
        return json.loads(file.read_text()) | texts.get(str(file.parent.relative_to(state_dir)), {})

    return {name: [read(file) for file in found] for name, found in files.items() if found}


def mean_and_spread(numbers: list[float], digits: int = 4) -> str:
    """`mean ± standard deviation`; of one value the value, of values that are all equal that one."""
    mean = statistics.mean(numbers)
    shown = f"{mean:,.0f}" if 10**digits <= abs(mean) < 1e9 else f"{mean:.{digits}g}"
    return shown if len(set(numbers)) < 2 else f"{shown} ± {statistics.stdev(numbers):.2g}"


def table(results: Results, columns: dict[str, str]) -> str:
    """A row for each variant; `columns`: metric -> heading. A metric that no variant has is left out."""
    rows = []
    for variant, seeds in results.items():
        row: dict = {"": short(variant), "seeds": len(seeds)}
        for metric, heading in columns.items():
            of_seeds = values(seeds, metric)
            row[heading] = mean_and_spread(of_seeds) if of_seeds else None
        rows.append(row)
    return markdown_table(rows)


def by_kind(results: Results) -> Results:
    """Metrics `METRIC@KIND` as METRIC of `VARIANT KIND`, where a kind is a temperature or a sampler."""
    split: Results = {}
    for variant, seeds in results.items():
        kinds = dict.fromkeys(name.partition("@")[2] for one in seeds for name in one if "@" in name)
        for kind in kinds:
            split[f"{variant} {kind}"] = [
                {name.partition("@")[0]: one[name] for name in one if name.endswith(f"@{kind}")} for one in seeds
            ]
    return split


def best_kinds(results: Results, metric: str) -> dict[str, str]:
    """Variant -> the kind of images whose mean of a metric over the seeds is highest; none of those without a value."""
    best: dict[str, tuple[float, str]] = {}
    for name, seeds in by_kind(results).items():
        variant, _, kind = name.rpartition(" ")
        of_seeds = values(seeds, metric)
        if of_seeds:
            best[variant] = max(best.get(variant, (-math.inf, "")), (statistics.mean(of_seeds), kind))
    return {variant: kind for variant, (_, kind) in best.items()}


def table_of_learning_rates(files: list[Path]) -> str:
    """A row for each run that best_learning_rate.py has compared."""
    rows = [run for file in files for run in json.loads(file.read_text())["runs"]]
    return markdown_table([run | {"chosen": "yes" if run["chosen"] else ""} for run in rows], digits=4)


def show(claim: str, plan: dict, state_dir: Path) -> None:
    """Prints the tables of a claim; they are in CLAIM.md of the state folder, plot and samples in CLAIM*.png."""
    tokenizers = {name: sorted(state_dir.glob(f"{name}/results.json")) for name in plan.get("tokenizers", [])}
    runs = {name: sorted(state_dir.glob(f"{name}/*-measured/results.json")) for name in plan["variants"]}
    bounds, results = results_of(state_dir, tokenizers), results_of(state_dir, runs)
    choices = [file for name in plan.get("learning_rates", []) for file in state_dir.glob(f"{name}/results.json")]
    parts = [table(bounds, TOKENIZER_COLUMNS)] if bounds else []
    parts += [table_of_learning_rates(choices)] if choices else []
    if results:
        best = best_kinds(results, plan["best"]) if "best" in plan else {}
        parts.append(table(results, plan["table"]))
        if "table_of_images" in plan:
            of_images, chosen = by_kind(results), [f"{variant} {kind}" for variant, kind in best.items()]
            parts.append(table(of_images, plan["table_of_images"]))
            if chosen:
                parts.append("The best of each:")
                parts.append(table({name: of_images[name] for name in chosen}, plan["table_of_images"]))
        if "plot" in plan:
            plot(results, bounds, plan["plot"], state_dir / f"{claim}.png")
        kinds = {name: plan.get("samples", [best[name]] if name in best else []) for name in results}
        show_samples(kinds, plan.get("real_images"), state_dir, state_dir / f"{claim}_samples.png")
    text = "\n\n".join(parts) or f"{claim}: nothing is measured yet."
    (state_dir / f"{claim}.md").write_text(text + "\n")
    print(text)


def show_samples(kinds: dict[str, list[str]], real: str | None, state_dir: Path, path: Path) -> None:
    """Writes a row of images for each variant and each kind of images that it has, below a row of real ones."""
    rows = {
        f"{short(variant)}, {kind_title(kind)}": sampled_images(state_dir, variant, kind)
        for variant, of_variant in kinds.items()
        for kind in of_variant
    }
    rows = {title: images for title, images in rows.items() if images}
    if rows and real:
        size = next(iter(rows.values()))[0].size
        rows = {"held-out pages": real_images(state_dir / real, size)} | rows
    if rows:
        save_rows({title: images for title, images in rows.items() if images}, path)
