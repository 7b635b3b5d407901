"""examples/claims/: tables.py and plots.py show what the files of the runs say."""

import importlib
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from dnd_hf.files import write_json


CLAIMS = Path(__file__).parents[2] / "examples" / "claims"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))
    return importlib.import_module("tables")


RESULTS = {
    "C4/ours": [{"words@0.7": 0.9, "words@1.0": 0.6}, {"words@0.7": 0.5, "words@1.0": 0.7}],
    "C4/rival": [{"words@slow": math.nan, "words@quick": 0.0}, {"words@slow": math.nan, "words@quick": None}],
    "C4/silent": [{"words@slow": math.nan}],
}


def test_the_best_kind_has_the_highest_mean_over_the_seeds_and_needs_a_number(tables):
    assert tables.best_kinds(RESULTS, "words") == {"C4/ours": "0.7", "C4/rival": "quick"}


def test_a_table_has_mean_and_deviation_of_the_seeds_and_nothing_for_what_was_not_measured(tables):
    lines = tables.table(tables.by_kind(RESULTS), {"words": "words", "ppl": "PPL_OCR"}).splitlines()
    assert lines[0] == "|  | seeds | words |"
    assert "| ours 0.7 | 2 | 0.7 ± 0.28 |" in lines and "| rival slow | 2 |  |" in lines


@pytest.fixture
def state(tmp_path) -> Path:
    """The folder of two variants' runs, with samples and with the perplexity of their texts."""
    for number, name in enumerate(("ours", "rival")):
        folder = tmp_path / f"C9/{name}/0-measured"
        for kind in ("0.7", "1.0"):
            (folder / "samples" / kind).mkdir(parents=True)
            for seed in range(9):
                level = 100 * number + seed + (50 if kind == "1.0" else 0)
                Image.new("RGB", (32, 16), (level, level, level)).save(folder / "samples" / kind / f"{seed:06}.png")
        depths = {
            "nats_a_code_depth_1": 2.0,
            "nats_a_code_depth_2": 3.0,
            "entropy_depth_1": 5.0,
            "entropy_depth_2": 6.0,
        }
        words = {"words@0.7": 0.5 + number / 10, "words@1.0": 0.52, "words@0.5,1": 0.4}
        write_json(folder / "results.json", depths | words | {"nats_depth_1": 8.0, "nats_depth_2": 9.0})
    judged = {f"C9/{name}/0-measured": {"ppl@0.7": 33.0, "ppl@1.0": 99.0} for name in ("ours", "rival")}
    (tmp_path / "C9/perplexity-0").mkdir()
    write_json(tmp_path / "C9/perplexity-0/results.json", judged)
    return tmp_path


def test_tables_and_figures_show_the_best_of_each_variant(tables, state, capsys):
    plan = {
        "variants": {"C9/ours": {}, "C9/rival": {}, "C9/later": {}},
        "table": {"nats_depth_1": "nats"},
        "table_of_images": {"words": "words", "ppl": "PPL_OCR"},
        "best": "words",
        "plot": {
            "words@": "words",
            "ppl@": "PPL_OCR",
            "nats_depth": "nats",
            "nats_a_code_depth": "by depth",
            "x": "none",
        },
    }
    tables.show("C9", plan, state)
    shown = capsys.readouterr().out
    assert shown == (state / "C9.md").read_text()
    best = shown.split("The best of each:")[1].split()
    assert "later" not in shown and " ".join(best[-22:]).endswith("| rival 0.7 | 1 | 0.6 | 33 |")
    assert "| ours 1.0 | 1 | 0.52 | 99 |" in " ".join(best)
    assert Image.open(state / "C9.png").width > 4 * 500  # four panels: there is no metric x
    figure = Image.open(state / "C9_samples.png")
    columns, row = [4 + 36 * seed + 16 for seed in range(8)], 20 + 16 + 4
    assert [figure.getpixel((x, 20 + 8))[0] for x in columns] == [50 + seed for seed in range(8)]
    assert [figure.getpixel((x, row + 20 + 8))[0] for x in columns] == [100 + seed for seed in range(8)]
    assert figure.height == 2 * row + 4


def test_learning_rates_are_shown_with_the_one_that_was_chosen(tables, tmp_path):
    runs = [{"learning rate": rate, "held-out loss": 1.5, "chosen": rate == 0.1} for rate in (0.1, 0.3)]
    (tmp_path / "results.json").write_text(json.dumps({"runs": runs}))
    lines = tables.table_of_learning_rates([tmp_path / "results.json"]).splitlines()
    assert lines[2:] == ["| 0.1 | 1.5 | yes |", "| 0.3 | 1.5 |  |"]
