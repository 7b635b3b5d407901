"""What an evaluation leaves: the files, and what they say of what is missing."""

import json

from dnd_hf.evaluation.images import Failure
from dnd_hf.evaluation.reports import Report, write_json_lines


def test_results_are_written_as_json_and_as_a_page_that_shows_the_images(tmp_path):
    report = Report(rows=[{"model": "a|b", "fid": 2.5, "lpips": None}], details={"features": "vit"})
    report.images["grid.png"] = "The first samples"
    report.write(tmp_path / "new" / "out", "generation", {"seed": 0, "reference": None})
    results = json.loads((tmp_path / "new" / "out" / "results.json").read_text())
    assert results["task"] == "generation" and results["features"] == "vit" and results["settings"]["reference"] is None
    assert results["rows"] == report.rows and results["failures"] == [] and results["not_measured"] == {}
    assert "torch" in results["versions"] and results["machine"]["cpus"] > 0
    page = (tmp_path / "new" / "out" / "results.md").read_text().splitlines()
    assert page[:5] == ["# generation", "", "| model | fid |", "|---|---|", "| a\\|b | 2.5 |"]
    assert "![The first samples](grid.png)" in page and "0 images left out." in page
    assert '  "seed": 0' in page and not any("reference" in line for line in page)


def test_what_was_left_out_and_what_was_not_measured_is_said():
    report = Report(rows=[{"model": "a"}], not_measured={"rfid": "no features"})
    report.add_failures("a", [Failure(i, "open", "it is torn") for i in range(150)])
    report.tables["Guidance"] = [{"guidance_scale": 2.0}]
    page = report.markdown("rocr")
    assert "## Guidance\n\n| guidance_scale |\n|---|\n| 2 |" in page
    assert "Not measured: rfid, because no features\n" in page
    assert "150 images left out:" in page and page.count("it is torn") == 100
    assert "| a | 7 | open | it is torn |" in page and "... and 50 more, in results.json." in page


def test_texts_are_written_one_per_line(tmp_path):
    write_json_lines(tmp_path / "new" / "texts.jsonl", [{"text": "é\nb"}, {"text": ""}])
    lines = (tmp_path / "new" / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "é\nb"}, {"text": ""}] and "é" in lines[0]
