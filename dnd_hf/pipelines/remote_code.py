"""The source code that travels with a saved pipeline, so that it also loads where dnd_hf is not installed.

Each file is whole in itself: diffusers copies of a file's relative imports only those of the same folder.
"""

import ast
import sys
from pathlib import Path


PORTABLE_FILE = '''"""{name} of dnd_hf (Apache-2.0), written by `DnDPipeline.save_pretrained`.

The installed dnd_hf is used where there is one, otherwise this copy of its code.
"""

import importlib.util

{code}

if importlib.util.find_spec("dnd_hf"):
    from dnd_hf import {name}
'''


def portable_source(cls: type) -> str:
    """One self-contained module that defines `cls`: its own module and, before it, those it imports from this package.

    Raises:
        ValueError: two of these modules define the same name, or one imports another in a way that cannot be joined.
    """
    path = Path(sys.modules[cls.__module__].__file__)
    if not cls.__module__.startswith("dnd_hf."):
        return path.read_text(encoding="utf-8")  # loaded from such a file
    root = path.parents[cls.__module__.count(".") - 1]
    modules = _with_imports(path, root)
    _check_names(modules)
    code = "\n\n".join(_without_relative_imports(module) for module in modules)
    return PORTABLE_FILE.format(name=cls.__name__, code=code)


def _with_imports(path: Path, root: Path) -> list[Path]:
    """The module and all that it imports from this package, each behind those it needs."""
    modules = []
    for statement in _relative_imports(path):
        folder = path.parents[statement.level - 1]
        target = folder.joinpath(*(statement.module or "").split(".")).with_suffix(".py")
        if not target.is_file() or root not in target.parents or any(alias.asname for alias in statement.names):
            raise ValueError(f"{path}, line {statement.lineno}: must be `from .module import name`.")
        modules += _with_imports(target, root)
    return list(dict.fromkeys([*modules, path]))


def _relative_imports(path: Path) -> list[ast.ImportFrom]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def _without_relative_imports(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    for statement in _relative_imports(path):
        lines[statement.lineno - 1 : statement.end_lineno] = [""] * (statement.end_lineno - statement.lineno + 1)
    return "\n".join(lines)


def _check_names(modules: list[Path]) -> None:
    owners: dict[str, Path] = {}
    for path in modules:
        for name in _defined_names(ast.parse(path.read_text(encoding="utf-8"))):
            if name in owners:
                raise ValueError(f"{path} and {owners[name]} must not both define `{name}`: they become one file.")
            owners[name] = path


def _defined_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names
