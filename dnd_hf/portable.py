"""The source code that travels with a saved pipeline, so that it also loads where dnd_hf is not installed."""

import re
import sys
from pathlib import Path
from textwrap import indent

from diffusers.utils.dynamic_modules_utils import get_relative_imports


RELATIVE_IMPORT = re.compile(r"^from \.\w+ import (\([^)]*\)|[^\n]*)\n", flags=re.MULTILINE)
PORTABLE_FILE = '''"""{name} of dnd_hf (Apache-2.0), written by `DnDPipeline.save_pretrained`.

The installed dnd_hf is used where there is one, otherwise this copy of its code.
"""

import importlib
import importlib.util


if importlib.util.find_spec("dnd_hf"):
    {name} = importlib.import_module("dnd_hf").{name}
else:
{code}
'''


def portable_source(cls: type) -> str:
    """One self-contained module that defines `cls`: its own module and those it imports from this package."""
    path = Path(sys.modules[cls.__module__].__file__)
    if not get_relative_imports(path) and not cls.__module__.startswith("dnd_hf."):
        return path.read_text(encoding="utf-8")  # loaded from such a file
    code = "\n\n".join(RELATIVE_IMPORT.sub("", module.read_text(encoding="utf-8")) for module in _with_imports(path))
    return PORTABLE_FILE.format(name=cls.__name__, code=indent(code, "    ").rstrip())


def _with_imports(path: Path) -> list[Path]:
    modules = []
    for name in sorted(get_relative_imports(path)):
        modules += _with_imports(path.parent / f"{name}.py")
    return list(dict.fromkeys([*modules, path]))
