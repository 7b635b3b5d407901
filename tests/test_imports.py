"""Who imports whom inside dnd_hf, read from the syntax trees, and what `import dnd_hf` loads."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest

import dnd_hf


ROOT = Path(dnd_hf.__file__).parent

# What each room may import besides itself.
BELOW_MODELS = {"files", "figures", "ops", "generation"}
SHARED = {"arguments", "command_line", "messages", "processes"}
BELOW_JOBS = BELOW_MODELS | SHARED | {"models", "pipelines", "bundled", "data", "dnd_hf"}
ALLOWED = {
    "files": set(),
    "figures": {"files"},
    "ops": {"files", "figures"},
    "generation": {"files", "figures", "ops"},
    "models": BELOW_MODELS,
    "pipelines": BELOW_MODELS | {"models"},
    "bundled": set(),
    "messages": set(),
    "processes": set(),
    "data": {"files", "messages", "ops"},
    "arguments": {"data"},
    "command_line": {"messages"},
    "conversion": BELOW_JOBS,
    "training": BELOW_JOBS,
    "evaluation": BELOW_JOBS,
    "dnd_hf": {"bundled", "conversion", "models", "pipelines"},
}
EXCEPTIONS = {("pipelines.bundled", "dnd_hf")}
"""That file stands for the installed package, to diffusers."""


class Import(NamedTuple):
    """One import; modules without "dnd_hf.", but for the package itself."""

    importer: str
    line: int
    imported: str

    @property
    def rooms(self) -> tuple[str, str]:
        return self.importer.partition(".")[0], self.imported.partition(".")[0]


def find_modules(root: Path) -> dict[str, Path]:
    """The modules of a package by their names."""
    modules = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "dnd_hf"] = path
    return modules


def find_imports(root: Path) -> list[Import]:
    """All imports of one module of a package by another, also those inside functions and for type checkers."""
    modules, found = find_modules(root), []
    for importer, path in modules.items():
        parents = path.relative_to(root).parent.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = ("dnd_hf", *parents[: len(parents) + 1 - node.level]) if node.level else ()
                base = ".".join([*start, *filter(None, [node.module])])
                targets = [f"{base}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                package, _, name = target.partition(".")
                if package == "dnd_hf":
                    while name and name not in modules:  # a name in a module
                        name = name.rpartition(".")[0]
                    found.append(Import(importer, node.lineno, name or "dnd_hf"))
    return found


def wrong_imports(root: Path) -> list[Import]:
    """Those against the direction of the plan."""
    return [
        one
        for one in find_imports(root)
        if len(set(one.rooms)) == 2
        and one.rooms[1] not in ALLOWED[one.rooms[0]]
        and (one.importer, one.imported) not in EXCEPTIONS
    ]


def test_every_room_has_a_place_in_the_plan():
    assert {name.partition(".")[0] for name in find_modules(ROOT)} == set(ALLOWED)


def test_no_module_imports_against_the_direction_of_the_plan():
    assert len(find_imports(ROOT)) > 50
    assert wrong_imports(ROOT) == []


def test_no_modules_import_each_other():
    graph = {}
    for one in find_imports(ROOT):
        if one.importer != one.imported:
            graph.setdefault(one.importer, set()).add(one.imported)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize(
    ("importer", "statement", "imported"),
    [
        ("ops/one.py", "from ..models.two import a", "models.two"),
        ("ops/one.py", "def late():\n    from ..models import two", "models.two"),
        ("models/one.py", "import dnd_hf.pipelines.two as x", "pipelines.two"),
        ("bundled/__init__.py", "from ..files import a", "files"),
        ("training/one.py", "try:\n    from dnd_hf.evaluation.two import a\nexcept ImportError: ...", "evaluation.two"),
        ("generation/one.py", "if TYPE_CHECKING:\n    from ..models.two import A", "models.two"),
        ("data/one.py", "from .. import A", "dnd_hf"),
        ("files.py", "from .ops.two import a", "ops.two"),
    ],
)
def test_a_wrong_import_is_found_wherever_it_stands(importer, statement, imported, tmp_path):
    for name in ("__init__.py", "files.py", importer, f"{imported.replace('.', '/')}.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert wrong_imports(tmp_path) == []
    (tmp_path / importer).write_text(statement)
    assert [one.imported for one in wrong_imports(tmp_path)] == [imported]


def test_importing_the_package_loads_the_transformers_and_nothing_else():
    program = """
        import sys

        import dnd_hf

        rooms = {name.split(".")[1] for name in sys.modules if name.startswith("dnd_hf.")}
        assert rooms == {"generation", "models", "ops"}, rooms
        assert "dnd_hf.models.autoencoder_rqvae" not in sys.modules
        heavy = {"datasets", "diffusers.pipelines.pipeline_utils", "matplotlib", "pandas", "torchvision"}
        assert not heavy & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", dedent(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_is_known_to_type_checkers():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    for name in dnd_hf.__all__:
        assert getattr(dnd_hf, name).__name__ == name
        assert name in imported and name in dir(dnd_hf)
    with pytest.raises(AttributeError, match="has no attribute 'DnDPipelines'"):
        dnd_hf.DnDPipelines  # noqa: B018
