"""How a script reads its command line, and how it ends: with its work done, or with one line that says why not."""

import copy
import errno
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil
import yaml
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .messages import BesideProgressBars, close_progress_bars


Arguments = TypeVar("Arguments")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Each option by one of its names and the kind of its value, with its default where there is one to tell."""

    def _format_action_invocation(self, action: Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        return super()._format_action_invocation(shown)

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        kinds: dict[Any, str] = {string_to_bool: "BOOL", int: "INT", float: "FLOAT"}
        return kinds.get(action.type, "TEXT")

    def _get_help_string(self, action: Action) -> str | None:
        if action.option_strings[0] == f"--no_{action.dest}":
            return f"The same as --{action.dest} false."
        untold = action.default is False or action.default in (None, [], SUPPRESS)
        return action.help if untold else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Groups the options by the dataclass that declares them; the start of its docstring is the heading."""

    def __init__(self, arguments_class: type):
        self.groups: dict[str, Any] = {}
        about = getattr(sys.modules.get(arguments_class.__module__), "__doc__", None) or ""
        about, usage = about.split("\n\n")[0], "%(prog)s [--option value ...]"
        super().__init__(
            arguments_class,
            usage=usage,
            description=about,
            formatter_class=partial(_HelpFormatter, max_help_position=34),
        )
        for action in self._actions:
            action.help = name_options(action.help or "", arguments_class)

    def _parse_dataclass_field(self, parser: "_Parser", field: Field) -> None:
        bases = reversed(self.dataclass_types[0].__mro__)
        declaring = next(base for base in bases if field.name in vars(base).get("__annotations__", ()))
        heading = re.split(r"[.,:;]", declaring.__doc__)[0]
        if heading not in self.groups:
            self.groups[heading] = self.add_argument_group(heading)
        super()._parse_dataclass_field(self.groups[heading], field)

    def error(self, message: str) -> NoReturn:
        _leave(f"{message} (--help lists the options)", 2)


def parse_arguments(arguments_class: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """Reads `argv` (default: the command line) into a dataclass; `--config file.yaml` gives defaults below the options.

    Leaves the program with a message where an option is unknown, or the dataclass raises ValueError.
    """
    parser = _Parser(arguments_class)
    parser.add_argument("--config", help="YAML file of these options; the command line overrides it.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of every error.")
    argv = sys.argv[1:] if argv is None else argv
    given, _ = parser.parse_known_args(argv)
    if given.config:
        parser.set_defaults(**_read_options(given.config, arguments_class, parser))
    options = vars(parser.parse_args(argv))
    del options["config"], options["debug"]
    try:
        return arguments_class(**options)
    except ValueError as error:
        parser.error(name_options(str(error), arguments_class))


def _read_options(path: str, arguments_class: type, parser: HfArgumentParser) -> dict[str, Any]:
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {' '.join(str(error).split())}")
    if not isinstance(options, dict):
        parser.error(f"--config {path}: a line for each option is needed, `name: value`.")
    unknown = set(map(str, options)) - {field.name for field in fields(arguments_class)}
    if unknown:
        parser.error(f"{path} has unknown options: {', '.join(sorted(unknown))}")
    return options


def run_script(main: Callable[[Arguments], None], arguments_class: type[Arguments]) -> None:
    """Runs a script with the options of its command line, and ends it as a command ends.

    What the user can mend (a bad value, a missing file or package) is one line and exit code 2; a run that had to stop
    (a RuntimeError of this project, a full disk) one line and exit code 1. Other errors keep their traceback, and with
    `--debug` all do. Of several processes the main one prints; another one only where the main one keeps running.
    """
    # diffusers passes huggingface_hub an argument that this one no longer knows.
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
    logging.basicConfig(format="%(message)s", handlers=[BesideProgressBars()])
    if "--debug" in sys.argv:
        main(parse_arguments(arguments_class))
        return
    try:
        main(parse_arguments(arguments_class))
    except KeyboardInterrupt:
        _leave("interrupted", 128 + signal.SIGINT)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        message, is_ours = _origin(error)
        if isinstance(error, RuntimeError) and not is_ours:
            raise
        failed = isinstance(error, RuntimeError) or getattr(error, "errno", None) in FULL_DISK
        _leave(name_options(message, arguments_class), 1 if failed else 2)


def _leave(message: str, code: int) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":
        # The launcher ends this process as soon as the main one has ended, with the same message.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
        message = f"process {os.environ['RANK']}: {message}"
    close_progress_bars()
    line = f"{Path(sys.argv[0]).name}: error: {message}"
    print(line + _launcher_note(), file=sys.stderr)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # of torchrun, whose report ends with this message
        report = {"message": line, "timestamp": int(time.time())}
        with suppress(OSError):  # the disk may be full
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(report), encoding="utf-8")
    sys.exit(code)


def _launcher_note() -> str:
    """Whose traceback follows, where a launcher is going to show one."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        return " (What follows is the report of the launcher, whose last lines repeat this.)"
    parent = psutil.Process().parent() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
    command = parent.cmdline() if parent else []
    if not any("accelerate" in word for word in command) or {"--quiet", "-q"} & set(command):
        return ""
    return " (The traceback below is that of accelerate; `accelerate launch --quiet` leaves it out.)"


def _origin(error: Exception) -> tuple[str, bool]:
    """The message of an error, and whether this project's own code raised it."""
    message = str(error)
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    if "Original Traceback" in message:  # of a worker of a DataLoader
        file = re.findall(r'File "([^"]+)"', message)[-1]
        message = message.strip().rpartition("\n")[2].partition(": ")[2]
    folders = (Path(__file__).parent, Path(sys.argv[0]).resolve().parent)
    is_ours = any(folder in Path(file).resolve().parents for folder in folders)
    return message if is_ours else f"{' '.join(message.split())} (--debug shows where)", is_ours


def name_options(message: str, arguments_class: type) -> str:
    """A message with the library's `names` of arguments as the `--names` of the script's options."""
    names = {field.name for field in fields(arguments_class)}
    return re.sub(r"`(\w+)`", lambda match: f"--{match[1]}" if match[1] in names else match[0], message)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Says of a model that cannot be loaded where it was looked for.

    Raises:
        FileNotFoundError: there is no folder `name`, and no repository of this name on the Hub that can be read.
    """
    try:
        yield
    except (OSError, HFValidationError) as error:
        if Path(name).exists() or getattr(error, "errno", None) in FULL_DISK:
            raise
        offline = " The Hub is not asked, since HF_HUB_OFFLINE is set." if HF_HUB_OFFLINE else ""
        raise FileNotFoundError(
            f"there is no folder {name}, and no repository {name} on the Hub that can be read.{offline}"
        ) from error
