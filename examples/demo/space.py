"""Writes the page as a Space of the Hub: the app, the package, and what says how they run."""

import configparser
import re
import shutil
from pathlib import Path

import gradio


REPOSITORY = Path(__file__).parents[2]
EXTRA = "demo"

FRONT_MATTER = """\
---
title: dnd_hf
emoji: 🔤
colorFrom: indigo
colorTo: blue
sdk: gradio
sdk_version: {gradio}
app_file: app.py
python_version: "3.11"
license: apache-2.0
short_description: Watch an autoregressive model of residual codes make images
---

The demo page of dnd_hf. `python examples/app.py --export_space` wrote this folder; `requirements.txt` has the versions
that the tests run with.
"""


def requirements() -> list[str]:
    """What the package and the page need, from setup.cfg, at the versions of constraints.txt where it has them."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    needed = setup["options"]["install_requires"].split() + setup["options.extras_require"][EXTRA].split()
    pinned = dict(re.findall(r"(?m)^([\w-]+)==(.+)$", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")))
    names = [re.match(r"[\w-]+", one)[0] for one in needed]
    return [
        f"{name}=={pinned[name]}" if name in pinned else one for name, one in zip(names, needed) if name != "gradio"
    ]


def export_space(folder: str | Path) -> None:
    """Writes the Space into a folder that is empty or not there.

    Gradio itself is no line of requirements.txt: the front matter says its version.

    Raises:
        ValueError: the folder is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"`export_space` must be an empty or a new folder, {folder} is not empty.")
    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "dnd_hf", folder / "dnd_hf", ignore=ignored)
    shutil.copytree(REPOSITORY / "examples" / "demo", folder / "demo", ignore=ignored)
    for source in ("examples/app.py", "LICENSE"):
        shutil.copy(REPOSITORY / source, folder)
    (folder / "README.md").write_text(FRONT_MATTER.format(gradio=gradio.__version__), encoding="utf-8")
    lines = ["--extra-index-url https://download.pytorch.org/whl/cpu", *requirements()]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Spaces are git repositories; files of this size go by git LFS.
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n", encoding="utf-8")
