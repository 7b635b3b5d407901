"""examples/claims/: the text is cut into pages as the scripts say; the settings make a model small enough to bundle."""

import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from dnd_hf import DnDForImageGeneration, bundled_checkpoint
from dnd_hf.command_line import parse_arguments
from dnd_hf.data.text import TextImages


EXAMPLES = Path(__file__).parents[2] / "examples"
CLAIMS = EXAMPLES / "claims"
ARGUMENTS = {"train.py": "DnDArguments", "claims/diffusion.py": "DiffusionArguments"}
BUNDLE_LIMIT = 16e6
"""Bytes of a bundled model's weights, the transformer's and the tokenizer's together."""


def read(name: str, script: str, arguments: str, *options: str):
    """The arguments that a script makes of a file of settings; unknown or ill-typed options end the test."""
    module = runpy.run_path(str(EXAMPLES / script))
    return parse_arguments(module[arguments], ["--config", str(CLAIMS / f"{name}.yaml"), *options])


@pytest.fixture
def books(tmp_path, monkeypatch) -> dict[str, list[str]]:
    """Stands in for the program `bible`: books of 100 numbered words, two verses each; returns their words."""
    held_out = runpy.run_path(str(CLAIMS / "prepare_verses.py"))["HELD_OUT"]
    books = {book: [f"{book}{number}" for number in range(100)] for book in ("Ge", "1Sm", *held_out)}
    lines = []
    for book, words in books.items():
        lines += [f"{book}1:1 {' '.join(words[:50])}", f"{book}12:3 {' '.join(words[50:])}"]
    program = tmp_path / "bin" / "bible"
    program.parent.mkdir()
    text = json.dumps("\n".join(lines))
    program.write_text(
        f"#!{sys.executable}\nimport sys\nassert sys.argv[1:] == ['-f', 'Gen1:1-Rev22:21']\nprint({text})"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return books


def prepare(monkeypatch, folder: Path, *options: str) -> dict[str, list[dict]]:
    """Runs prepare_verses.py; returns the rows of each file that it wrote."""
    monkeypatch.setattr(sys, "argv", ["prepare_verses.py", "--output_dir", str(folder), *options])
    runpy.run_path(str(CLAIMS / "prepare_verses.py"), run_name="__main__")
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}


def test_books_are_held_out_whole_and_windows_overlap_within_the_others(books, tmp_path, monkeypatch):
    files = prepare(monkeypatch, tmp_path / "text", "--stride", "7")
    whole = files["train_books"] + files["held_out_books"]
    assert {row["book"]: row["text"].split() for row in whole} == books
    assert [row["book"] for row in files["train_books"]] == ["Ge", "1Sm"]
    expected = [books[book][start : start + 40] for book in ("Ge", "1Sm") for start in range(0, 61, 7)]
    assert [row["text"].split() for row in files["train_windows"]] == expected


def test_rare_letters_have_as_many_windows_as_common_ones(monkeypatch):
    balanced = runpy.run_path(str(CLAIMS / "prepare_verses.py"))["balanced"]
    rows = [{"text": "a b c"}] * 900 + [{"text": "a z"}] * 30 + [{"text": "a" * 80 + " q"}]
    texts = [row["text"] for row in balanced(rows, per_letter=20)]
    # 20 rows of a are drawn from all; b, c and z have 20 of their own; q is not among the first letters of its row.
    assert len(texts) == 80 and texts.count("a b c") >= 40 and texts.count("a z") >= 20
    assert balanced(rows, 20) == balanced(rows, 20)


def test_a_line_that_is_no_verse_ends_with_an_error(books, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "bible"
    program.write_text(program.read_text() + "\nprint('Unknown reference')")
    with pytest.raises(ValueError, match="is no verse: 'Unknown reference'"):
        prepare(monkeypatch, tmp_path / "text")


def test_verses_has_pages_of_16_letters_by_8_lines_and_fits_into_a_bundle():
    options = ["--dataset_name", "x", "--output_dir", "y"]
    pages = read("verses_images", "make_text_images.py", "TextImageArguments", *options).images
    assert isinstance(pages, TextImages) and (pages.height, pages.width) == (8 * 16, 16 * 8)
    tokenizer = read("verses_rqvae", "train_rqvae.py", "RQVAEArguments", *options)
    letters = read("verses_rqvae_letters", "train_rqvae.py", "RQVAEArguments", *options)
    transformer = read("verses_dnd", "train.py", "DnDArguments", "--codes_dir", "x", "--output_dir", "y")
    assert letters.pretrained_vqvae
    with torch.device("meta"):
        vae = tokenizer.make_vae()
        model = transformer.make_transformer(vae, grid_size=vae.grid_size, num_classes=1, id2label={0: "text"})
    assert isinstance(model, DnDForImageGeneration) and tuple(vae.grid_size) == (16, 16) and vae.config.code_depth == 2
    assert not model.config.has_null_class
    assert 2 * sum(p.numel() for part in (vae, model) for p in part.state_dict().values()) < BUNDLE_LIMIT


def run_claim(monkeypatch, *options: str) -> None:
    """Runs run.py with each of its commands in this process, where the libraries are loaded already."""

    run = subprocess.run

    def run_here(line: list[str], cwd: Path | None = None, **options) -> Any:
        if cwd is None:  # another program
            return run(line, **options)
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", line[1:])
            runpy.run_path(line[1], run_name="__main__")
        AcceleratorState._reset_state(True)  # a process of its own would leave nothing behind
        GradientState._reset_state()
        return SimpleNamespace(returncode=0)

    with monkeypatch.context() as patch:
        patch.syspath_prepend(CLAIMS)
        patch.setattr(subprocess, "run", run_here)
        patch.setattr(sys, "argv", ["run.py", *options])
        runpy.run_path(str(CLAIMS / "run.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--claim", "C9"], 2, "invalid choice: 'C9'"),
        (["--claim", "C2"], 2, "--vqvae is needed: the folder of a tokenizer."),
        (["--claim", "C2", "--vqvae", "nowhere"], 2, "there is no nowhere/config.json."),
        (["--seeds", "0"], 2, "required: --claim"),
        (["--claim", "C2", "--seeds", "0", "--vqvae", "rqvae"], 1, "text ended with code 3; the same command"),
    ],
)
def test_a_claim_that_cannot_run_ends_with_one_line(monkeypatch, tmp_path, capsys, options, code, message):
    (tmp_path / "rqvae").mkdir()
    (tmp_path / "rqvae/config.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=3))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(CLAIMS / "run.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == code and line.startswith("run.py: error: ") and message in line


def test_a_claim_runs_from_the_text_to_its_table_and_never_twice(books, tmp_path, monkeypatch, capsys):
    vqvae = str(Path(bundled_checkpoint("words"), "vqvae"))
    options = ["--claim", "C2", "--state_dir", str(tmp_path), "--vqvae", vqvae, "--quick", "--seeds", "0"]
    run_claim(monkeypatch, *options, "--only", "C2/vertical-2")
    steps = [json.loads(line)["step"] for line in (tmp_path / "finished.jsonl").read_text().splitlines()]
    assert steps[0] == "text" and steps[-2:] == ["C2/vertical-2/0", "C2/vertical-2/0-measured"]
    results = json.loads((tmp_path / "C2/vertical-2/0-measured/results.json").read_text())
    assert results["nats"] == pytest.approx(results["nats_depth_1"] + results["nats_depth_2"])
    assert len(list((tmp_path / "C2/vertical-2/0-measured/samples/0.7").glob("*.png"))) == 4
    assert "| vertical-2 | 1 |" in capsys.readouterr().out and (tmp_path / "C2.png").exists()
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a finished step runs again"))
    run_claim(monkeypatch, *options, "--only", "C2/vertical-2")


def test_a_rival_of_c4_is_trained_beside_dnd_and_measured_with_each_of_its_samplers(
    books, tmp_path, monkeypatch, capsys
):
    vqvae = str(Path(bundled_checkpoint("words"), "vqvae"))
    options = ["--claim", "C4", "--state_dir", str(tmp_path), "--vqvae", vqvae, "--quick", "--seeds", "0"]
    run_claim(monkeypatch, *options, "--only", "C4/flow")
    results = json.loads((tmp_path / "C4/flow/0-measured/results.json").read_text())
    for sampler in ("euler-50", "heun-25", "heun-25-nearest-codes"):
        assert f"vocabulary_rate@{sampler}" in results  # without a number where no page has a word
        assert len(list((tmp_path / "C4/flow/0-measured/samples" / sampler).glob("*.png"))) == 4
    output = capsys.readouterr().out
    assert "| dnd-4 | 1 |" in output and "| flow | 1 |" in output
    ours = json.loads((tmp_path / "C2/dnd-4/0-measured/results.json").read_text())
    assert results["parameters"] == pytest.approx(ours["parameters"], rel=0.05)


@pytest.mark.parametrize("claim", sorted(path.stem for path in CLAIMS.glob("C*.yaml")))
def test_every_command_of_a_claim_has_options_that_its_script_takes(claim, monkeypatch):
    monkeypatch.syspath_prepend(CLAIMS)
    steps = runpy.run_path(str(CLAIMS / "run.py"))["steps_of"](claim, [0, 1])
    assert any(name.endswith("/1") for name in steps)
    for name, command in steps.items():
        script, *options = shlex.split(command)
        options = [str(EXAMPLES / option) if (EXAMPLES / option).is_file() else option for option in options]
        assert "{" not in command.replace("{vqvae}", "")
        if script in ARGUMENTS:
            arguments = runpy.run_path(str(EXAMPLES / script))[ARGUMENTS[script]]
            parse_arguments(arguments, [*options, "--output_dir", name])
