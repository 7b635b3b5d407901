"""The source code that travels with a saved pipeline, so that it also loads where dnd_hf is not installed.

Each file is whole in itself: of the relative imports of a file, diffusers copies only those of the same folder.
"""

import ast
import inspect
from pathlib import Path


REMOTE_FILE = '''"""{names} of dnd_hf (Apache-2.0), written by `DnDPipeline.save_pretrained`.

The installed dnd_hf is used where there is one, otherwise this copy of its code.
"""

import importlib
import importlib.util

{code}

if importlib.util.find_spec("dnd_hf"):
{installed}
'''
# Not an import statement: the hosts would ask for the package where it is missing.
INSTALLED = '    {name} = getattr(importlib.import_module("dnd_hf"), "{name}", {name})'

# Parts of a module that have names of their own.
OWN_NAMES = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)


def is_installed(cls: type) -> bool:
    """Whether a class is of the installed package; otherwise it is of the code in the folder of a saved pipeline."""
    return cls.__module__.startswith("dnd_hf.")


def remote_code(*classes: type) -> str:
    """One module that needs nothing else of dnd_hf and defines `classes`.

    It is the module of the first, which may import the others, see [`joined_modules`]. For classes that are not of the
    installed package, it is the file that they were loaded from.
    """
    path = Path(inspect.getfile(classes[0]))
    if not is_installed(classes[0]):
        return path.read_text(encoding="utf-8")
    names = [cls.__name__ for cls in classes]
    return REMOTE_FILE.format(
        names=" and ".join(names),
        code=joined_modules(path, path.parents[classes[0].__module__.count(".") - 1]),
        installed="\n".join(INSTALLED.format(name=name) for name in names),
    )


def joined_modules(path: Path, root: Path) -> str:
    """The code of a module, and before it that of all modules that it imports from the package whose folder is `root`.

    What stands under `if TYPE_CHECKING:` is left out.

    Raises:
        ValueError: two of these modules give one name different meanings, or one imports another in a way that cannot
            be joined.
    """
    modules = _with_imports(path, root, ())
    _check_names(modules)
    return "\n\n".join(_without_relative_imports(module) for module in modules)


def _with_imports(path: Path, root: Path, importers: tuple[Path, ...]) -> list[Path]:
    """The module and all that it imports from this package, each behind those that it needs."""
    if path in importers:
        raise ValueError(f"{path} imports itself by way of {importers[-1]}: such modules cannot become one file.")
    modules = []
    for node in _relative_imports(_parse(path)):
        target = path.parents[node.level - 1].joinpath(*(node.module or "").split(".")).with_suffix(".py")
        if not target.is_file() or root not in target.parents or any(alias.asname for alias in node.names):
            raise ValueError(f"{path}, line {node.lineno}: must be `from .module import name`.")
        modules += _with_imports(target, root, (*importers, path))
    return list(dict.fromkeys([*modules, path]))


def _parse(path: Path) -> ast.Module:
    """The syntax tree of a module, without what only a type checker reads."""
    tree = ast.parse(path.read_text(encoding="utf-8"), path)
    tree.body = [node for node in tree.body if not _is_for_type_checkers(node)]
    return tree


def _is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _relative_imports(tree: ast.Module) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def _without_relative_imports(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    blocks = [node for node in ast.parse(text).body if _is_for_type_checkers(node)]
    for node in [*blocks, *_relative_imports(_parse(path))]:
        indentation = lines[node.lineno - 1][: node.col_offset]
        for number in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[number] = f"{indentation}pass" if indentation else ""
    return "\n".join(lines)


def _check_names(modules: list[Path]) -> None:
    meanings: dict[str, tuple[str, Path]] = {}
    for path in modules:
        for name, meaning in _names(path).items():
            earlier, owner = meanings.setdefault(name, (meaning, path))
            if earlier != meaning:
                raise ValueError(f"{path} and {owner} must not both define `{name}`: they become one file.")


def _names(path: Path) -> dict[str, str]:
    """The names that a module gives a meaning, and the meaning: what is imported, or this module's own."""
    names = {}
    for node in _outside_functions(_parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = str(path)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = str(path)
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: f"import {alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "__future__":
            raise ValueError(f"{path}, line {node.lineno}: such an import must be the first of a file.")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _outside_functions(node: ast.AST) -> list[ast.AST]:
    """All nodes whose names are those of the module."""
    found = []
    for child in ast.iter_child_nodes(node):
        found.append(child)
        if not isinstance(child, OWN_NAMES):
            found += _outside_functions(child)
    return found
