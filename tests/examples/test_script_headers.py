"""Every script of examples/ says by PEP 723 what it needs, so that `uv run` starts it from a clone."""

import configparser
import re
from pathlib import Path

import pytest


tomllib = pytest.importorskip("tomllib")  # Python 3.11

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = sorted((REPOSITORY / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_runs_with_the_package_of_its_clone(script):
    block = re.match(r"# /// script\n((?:#(?: .*)?\n)+)# ///\n", script.read_text(encoding="utf-8"))
    header = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    assert header["requires-python"] == ">=3.11"  # that of transformers and diffusers
    if script.name == "reproduce_paper.py":  # goes to other machines without the clone, see docs/reproduce.md
        assert header["dependencies"] == []
        return
    (needed,) = header["dependencies"]
    name, extras = re.fullmatch(r"([\w-]+)(?:\[([\w,]+)\])?", needed).groups()
    assert name == setup["metadata"]["name"]
    assert set((extras or "").split(",")) - {""} <= set(setup["options.extras_require"])
    source = header["tool"]["uv"]["sources"][name]
    assert (script.parent / source["path"]).resolve() == REPOSITORY and source["editable"]
