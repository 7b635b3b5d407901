"""dnd_hf.command_line: options, and how a script ends: one line where the user is at fault, a traceback where not."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE, DnDConfig
from dnd_hf.command_line import loading, parse_arguments, run_script


@dataclass
class Options:
    error: str = ""
    vocab_size: int = 16

    def __post_init__(self):
        if self.vocab_size == 7:
            raise ValueError("--vocab_size must not be 7.")


def main(args: Options) -> None:
    if args.error == "library":
        DnDConfig(vocab_size=args.vocab_size)
    elif args.error == "foreign":
        int("seven")
    elif args.error == "file":
        Path("nowhere").read_text()
    elif args.error == "disk":
        raise OSError(errno.ENOSPC, "No space left on device")
    elif args.error == "stopped":
        raise RuntimeError("the run has diverged.")
    elif args.error == "bug":
        raise KeyError("missing")
    elif args.error == "interrupt":
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--vocab_size 7", 2, "--vocab_size must not be 7. (--help lists the options)"),
        ("--vocab_size many", 2, "argument --vocab_size/--vocab-size: invalid int value: 'many'"),
        ("--size 7", 2, "unrecognized arguments: --size 7"),
        ("--config nowhere.yaml", 2, "--config nowhere.yaml: [Errno 2] No such file"),
        ("--error library --vocab_size 0", 2, "--vocab_size must be"),
        ("--error foreign", 2, "invalid literal for int() with base 10: 'seven'"),
        ("--error file", 2, "No such file or directory: 'nowhere'"),
        ("--error disk", 1, "No space left on device"),
        ("--error stopped", 1, "the run has diverged."),
        ("--error interrupt", 130, "interrupted"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_an_exit_code(monkeypatch, capsys, tmp_path, options, code, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [__file__, *options.split()])
    with pytest.raises(SystemExit) as end:
        run_script(main, Options)
    written = capsys.readouterr()
    (line,) = written.err.splitlines()
    assert (end.value.code, written.out) == (code, "")
    assert line.startswith("test_command_line.py: error: ") and message in line


@dataclass
class Base:
    """How it is, and more. Much more."""

    learning_rate: float = HfArg(default=0.5, help="Peak.")
    seed: int = HfArg(default=0, help="Of all.")


@dataclass
class Derived(Base):
    """Options of this script."""

    npz: bool = HfArg(default=True, help="Write a file, without `flip`.")
    flip: bool = HfArg(default=False, help="Mirror.")
    model: str | None = HfArg(default=None, help="A folder.")


def test_the_help_groups_options_by_what_they_are_for_and_tells_what_no_option_does(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as end:
        parse_arguments(Derived, ["--help"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert end.value.code == 0 and __doc__ in lines
    base, own = lines.index("How it is:"), lines.index("Options of this script:")
    assert lines[base + 1 : own] == [
        "--learning_rate FLOAT Peak. (default: 0.5)",
        "--seed INT Of all. (default: 0)",
        "",
    ]
    assert lines[own + 1 :] == [
        "--npz [BOOL] Write a file, without --flip. (default: True)",
        "--no_npz The same as --npz false.",
        "--flip [BOOL] Mirror.",
        "--model TEXT A folder.",
    ]
    assert parse_arguments(Derived, ["--no-npz", "--learning-rate", "2"]) == Derived(2.0, npz=False)


def test_a_model_that_is_nowhere_is_told_as_that_and_one_that_is_here_keeps_its_error(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="there is no folder nosuch, and no repository nosuch on the Hub"),
        loading("nosuch"),
    ):
        RQVAE.from_pretrained("nosuch")
    with pytest.raises(OSError, match=r"config\.json"), loading(str(tmp_path)):
        RQVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "error"), [("--error bug", KeyError), ("--error library --vocab_size 0 --debug", ValueError)]
)
def test_a_bug_and_debug_show_the_traceback(monkeypatch, options, error):
    monkeypatch.setattr(sys, "argv", [__file__, *options.split()])
    with pytest.raises(error):
        run_script(main, Options)


def run_launched(folder: Path, main: str, launcher: list[str]) -> tuple[str, str]:
    """All that the processes of one script write, and the line that this project prints."""
    program = f"""
        import os, time
        from dataclasses import dataclass
        from dnd_hf.command_line import run_script

        @dataclass
        class Options:
            seed: int = 0

        def main(args):
            {main}

        run_script(main, Options)
    """
    (folder / "script.py").write_text(dedent(program))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "script.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("script.py: error: "))
    return done.stderr, line


TWO_PROCESSES = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


NOTE = " (What follows is the report of the launcher, whose last lines repeat this.)"


def test_an_error_is_one_line_also_where_the_file_of_the_launcher_cannot_be_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone/error.json"))
    monkeypatch.setattr(sys, "argv", [__file__, "--error", "disk"])
    with pytest.raises(SystemExit) as end:
        run_script(main, Options)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and "No space left on device" in line


def test_of_several_processes_the_main_one_says_what_is_wrong_and_the_report_of_the_launcher_ends_with_it(tmp_path):
    output, line = run_launched(tmp_path, "raise ValueError('`seed` must be odd.')", TWO_PROCESSES)
    assert line == f"script.py: error: --seed must be odd.{NOTE}"
    *_, exit_code, _, told, _ = output.splitlines()
    assert exit_code.startswith("  exitcode  : 2") and told == "  traceback : script.py: error: --seed must be odd."


def test_a_process_that_fails_while_the_main_one_works_says_so_itself(tmp_path):
    fail = "time.sleep(60) if os.environ['RANK'] == '0' else int('x')"
    output, line = run_launched(tmp_path, fail, TWO_PROCESSES)
    assert line.startswith("script.py: error: process 1: invalid literal for int()")
    assert output.splitlines()[-2] == f"  traceback : {line.removesuffix(NOTE)}"


@pytest.mark.parametrize("quiet", [False, True])
def test_under_accelerate_the_line_says_whose_traceback_follows_and_how_to_leave_it_out(tmp_path, quiet):
    launcher = ["accelerate.commands.launch", "--cpu", *(["--quiet"] if quiet else [])]
    output, line = run_launched(tmp_path, "raise ValueError('`seed` must be odd.')", launcher)
    note = " (The traceback below is that of accelerate; `accelerate launch --quiet` leaves it out.)"
    assert line == "script.py: error: --seed must be odd." + note * (not quiet)
    assert ("Traceback" in output) == (not quiet)
