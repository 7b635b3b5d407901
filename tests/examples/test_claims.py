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
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

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


def prepare(folder: Path, *options: str) -> dict[str, list[dict]]:
    """Runs prepare_verses.py; returns the rows of each file that it wrote."""
    script = runpy.run_path(str(CLAIMS / "prepare_verses.py"))
    script["main"](parse_arguments(script["VersesArguments"], ["--output_dir", str(folder), *options]))
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}


def test_books_are_held_out_whole_and_windows_overlap_within_the_others(books, tmp_path):
    files = prepare(tmp_path / "text", "--stride", "7")
    whole = files["train_books"] + files["held_out_books"]
    assert {row["book"]: row["text"].split() for row in whole} == books
    assert [row["book"] for row in files["train_books"]] == ["Ge", "1Sm"]
    expected = [books[book][start : start + 40] for book in ("Ge", "1Sm") for start in range(0, 61, 7)]
    assert [row["text"].split() for row in files["train_windows"]] == expected


def test_rare_letters_have_as_many_windows_as_common_ones():
    balanced = runpy.run_path(str(CLAIMS / "prepare_verses.py"))["balanced"]
    rows = [{"text": "a b c"}] * 900 + [{"text": "a z"}] * 30 + [{"text": "a" * 80 + " q"}]
    texts = [row["text"] for row in balanced(rows, per_letter=20)]
    # 20 rows of a are drawn from all; b, c and z have 20 of their own; q is not among the first letters of its row.
    assert len(texts) == 80 and texts.count("a b c") >= 40 and texts.count("a z") >= 20
    assert balanced(rows, 20) == balanced(rows, 20)


def test_a_line_that_is_no_verse_ends_with_an_error(books, tmp_path):
    program = tmp_path / "bin" / "bible"
    program.write_text(program.read_text() + "\nprint('Unknown reference')")
    with pytest.raises(ValueError, match="is no verse: 'Unknown reference'"):
        prepare(tmp_path / "text")


def test_verses_has_pages_of_16_letters_by_8_lines_and_fits_into_a_bundle():
    options = ["--dataset_name", "x", "--output_dir", "y"]
    pages = read("verses_images", "make_text_images.py", "TextImageArguments", *options).images
    assert isinstance(pages, TextImages) and (pages.height, pages.width) == (8 * 16, 16 * 8)
    tokenizer = read("pages_rqvae", "train_rqvae.py", "RQVAEArguments", "--local_encoder", *options)
    transformer = read("verses_dnd", "train.py", "DnDArguments", "--codes_dir", "x", "--output_dir", "y")
    with torch.device("meta"):
        vae = tokenizer.make_vae()
        model = transformer.make_transformer(vae, grid_size=vae.grid_size, num_classes=1, id2label={0: "text"})
    assert isinstance(model, DnDForImageGeneration) and tuple(vae.grid_size) == (16, 16) and vae.config.code_depth == 2
    assert vae.config.local_encoder
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


@pytest.mark.parametrize("script", sorted(path.name for path in CLAIMS.glob("*.py") if "__main__" in path.read_text()))
def test_every_script_ends_with_one_line_where_an_option_is_wrong(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(CLAIMS))
    monkeypatch.setattr(sys, "argv", [script, "--no_such_option"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(CLAIMS / script), run_name="__main__")
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and line.startswith(f"{script}: error: ") and "--help lists the options" in line


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


def test_c4_runs_from_the_choice_of_learning_rates_to_its_tables_and_its_figure(books, tmp_path, monkeypatch, capsys):
    vqvae = str(Path(bundled_checkpoint("words"), "vqvae"))
    run_claim(monkeypatch, "--claim", "C4", "--state_dir", str(tmp_path), "--vqvae", vqvae, "--quick", "--seeds", "0")
    for rival in ("ddpm", "flow"):
        tuned = json.loads((tmp_path / f"C4/tuned-{rival}/results.json").read_text())
        losses = {run["learning rate"]: run["held-out loss"] for run in tuned["runs"]}
        assert sorted(losses) == [3e-4, 1e-3, 3e-3] and losses[tuned["learning_rate"]] == min(losses.values())
        trained = json.loads((tmp_path / f"C4/{rival}/0/checkpoint-2/settings.json").read_text())
        assert trained["options"]["learning_rate"] == tuned["learning_rate"]
    samplers = {
        "dnd": ["0.5", "0.7", "1.0"],
        "ddpm": ["ddim-50", "dpm-solver-25", "ddpm-250"],
        "flow": ["euler-50", "heun-25", "heun-25-nearest-codes"],
    }
    output = capsys.readouterr().out
    for name, kinds in samplers.items():
        results = json.loads((tmp_path / f"C4/{name}/0-measured/results.json").read_text())
        assert (results["training_steps"], results["training_images"]) == (2, 8) and results["training_flops"] > 0
        for kind in kinds:
            assert f"vocabulary_rate@{kind}" in results and f"| {name} {kind} | 1 |" in output
            assert len(list((tmp_path / f"C4/{name}/0-measured/samples" / kind).glob("*.png"))) == 4
    judged = json.loads((tmp_path / "C4/perplexity-of-bytes-0/results.json").read_text())
    assert judged["C2/tokenizer-4"]["ppl_of_bytes@real"] > 1
    # A row of 8 real pages, and one of each model's best samples.
    figure = Image.open(tmp_path / "C4_samples.png")
    assert figure.width > 8 * 128 and figure.height > 4 * 64


def test_rivals_of_c4_have_as_many_parameters_as_dnd_and_its_floating_point_operations(monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))
    from fit_codes import changed
    from rivals import LatentFlow, training_flops

    given = ["--dataset_name", "x", "--output_dir", "y"]
    plan = yaml.safe_load((CLAIMS / "C4.yaml").read_text())
    options = shlex.split(plan["variants"]["C4/dnd"]["train"])[3:]
    ours = read("pages_transformer", "train.py", "DnDArguments", *options, "--output_dir", "x")
    networks = read("pages_rqvae", "train_rqvae.py", "RQVAEArguments", *given).make_vae()
    pages = dict(code_depth=4, code_patch_size=[2, 2], sample_size=[64, 128], shared_codebook=False)
    vae = changed(networks, **pages).eval()
    model = ours.make_transformer(vae, grid_size=(4, 8), num_classes=1, id2label={0: "text"}).train()
    codes, label = torch.zeros(1, 4, 8, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    compute = training_flops(lambda: model(label, codes, labels=codes).loss) * 32 * ours.max_train_steps
    ddpm = read("pages_ddpm", "claims/diffusion.py", "DiffusionArguments", *given)
    flow = read("pages_flow", "claims/diffusion.py", "DiffusionArguments", *given, "--vqvae", "x")
    shape = flow.num_hidden_layers, flow.num_attention_heads, flow.attention_head_dim
    latents = LatentFlow.new(vae, torch.rand(2, 3, 64, 128), *shape)
    for rival, settings in ((ddpm.make_ddpm((64, 128)), ddpm), (latents, flow)):
        assert count(rival.network) == pytest.approx(count(model), rel=0.05)
        assert settings.max_training_flops == pytest.approx(compute, rel=0.001)


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def write_run(folder: Path, rate: float, loss: float, steps: int = 4, batch: int = 2) -> Path:
    """What a run of diffusion.py leaves for best_learning_rate.py."""
    (folder / f"checkpoint-{steps}").mkdir(parents=True)
    options = {"learning_rate": rate, "output_dir": folder.name, "train_batch_size": batch}
    (folder / f"checkpoint-{steps}" / "settings.json").write_text(json.dumps({"options": options, "facts": {}}))
    lines = [{"step": 2, "validation/loss": 0.0}, {"step": steps, "train/loss": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": steps, "validation/loss": loss}) + "\n")
    return folder


def choose(tmp_path: Path, runs: list[Path]) -> dict:
    """The settings that best_learning_rate.py writes."""
    (tmp_path / "base.yaml").write_text("rival: flow\nlearning_rate: 0.5\n")
    options = ["--runs", *map(str, runs), "--settings", str(tmp_path / "base.yaml")]
    options += ["--output_dir", str(tmp_path / "o")]
    script = runpy.run_path(str(CLAIMS / "best_learning_rate.py"))
    script["main"](parse_arguments(script["ChoiceArguments"], options))
    return yaml.safe_load((tmp_path / "o" / "config.yaml").read_text())


def test_the_learning_rate_with_the_lowest_last_loss_is_chosen_and_one_at_the_end_is_told(tmp_path, capsys):
    runs = [write_run(tmp_path / str(i), rate, loss) for i, (rate, loss) in enumerate([(1, 3.0), (3, 2.0), (2, 1.0)])]
    assert choose(tmp_path, runs) == {"rival": "flow", "learning_rate": 2}
    assert "rate beyond" not in capsys.readouterr().out
    assert choose(tmp_path, runs[:2]) == {"rival": "flow", "learning_rate": 3}
    assert "rate beyond" in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"steps": 5}, {"batch": 3}, {"rate": 1}])
def test_runs_that_cannot_be_compared_by_their_learning_rate_are_refused(tmp_path, other):
    runs = [write_run(tmp_path / "a", 1, 1.0), write_run(tmp_path / "b", **({"rate": 2, "loss": 1.0} | other))]
    with pytest.raises(ValueError, match="learning rate"):
        choose(tmp_path, runs)


def test_a_run_that_was_not_validated_at_its_end_is_refused(tmp_path):
    run = write_run(tmp_path / "a", 1, 1.0)
    (run / "checkpoint-6").mkdir()
    with pytest.raises(ValueError, match="no held-out loss at its last step"):
        choose(tmp_path, [run])


@pytest.mark.parametrize("claim", sorted(path.stem for path in CLAIMS.glob("C*.yaml")))
def test_every_command_of_a_claim_has_options_that_its_script_takes(claim, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(CLAIMS)
    monkeypatch.chdir(tmp_path)
    for rival in ("ddpm", "flow"):  # what best_learning_rate.py will have written
        Path("C4", f"tuned-{rival}").mkdir(parents=True)
        Path("C4", f"tuned-{rival}", "config.yaml").write_text((CLAIMS / f"pages_{rival}.yaml").read_text())
    steps = runpy.run_path(str(CLAIMS / "run.py"))["steps_of"](claim, [0, 1])
    assert any(name.endswith("/1") for name in steps)
    for name, command in steps.items():
        script, *options = shlex.split(command)
        options = [str(EXAMPLES / option) if (EXAMPLES / option).is_file() else option for option in options]
        assert "{" not in command.replace("{vqvae}", "")
        if script in ARGUMENTS:
            arguments = runpy.run_path(str(EXAMPLES / script))[ARGUMENTS[script]]
            parse_arguments(arguments, [*options, "--output_dir", name])
