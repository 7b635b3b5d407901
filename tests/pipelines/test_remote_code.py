"""The files of code of a saved pipeline: which modules become one, and which cannot."""

import ast
import logging
import sys
from textwrap import dedent

import diffusers.utils.dynamic_modules_utils as diffusers_modules
import pytest
import transformers.dynamic_module_utils as transformers_modules

from dnd_hf import (
    RQVAE,
    DnDConfig,
    DnDForImageGeneration,
    DnDPipeline,
    RQTransformerConfig,
    RQTransformerForImageGeneration,
)
from dnd_hf.pipelines.remote_code import joined_modules, remote_code


FILES = [
    (DnDPipeline,),
    (DnDForImageGeneration, DnDConfig),
    (RQTransformerForImageGeneration, RQTransformerConfig),
    (RQVAE,),
]


@pytest.mark.parametrize("classes", FILES, ids=lambda classes: classes[0].__name__)
def test_the_libraries_find_no_import_in_it_that_is_missing_or_relative(classes, tmp_path, monkeypatch, caplog):
    file = tmp_path / "code.py"
    file.write_text(remote_code(*classes))
    for name in ("dnd_hf", "liger_kernel", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    for module in (diffusers_modules, transformers_modules):
        monkeypatch.setattr(logging.getLogger(module.__name__.split(".")[0]), "propagate", True)
        assert module.check_imports(file) == []
    assert not caplog.records


@pytest.fixture
def join(tmp_path):
    """A function that makes a package of the given files and joins `models/model.py` with what it imports."""

    def make(**files: str) -> str:
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("_")).with_suffix(".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(dedent(text))
        return joined_modules(tmp_path / "models" / "model.py", tmp_path)

    return make


def test_modules_of_several_folders_become_one_that_runs(join):
    code = join(
        ops_scale="""
            import math as m

            FACTOR = m.floor(3.5)
        """,
        models_config="""
            from ..ops.scale import FACTOR

            numbers = [FACTOR for FACTOR in range(2)]
            SIZE = FACTOR + 1
        """,
        models_model="""
            from typing import TYPE_CHECKING

            from ..ops.scale import (
                FACTOR,
            )
            from .config import SIZE

            if TYPE_CHECKING:
                from ..pipelines.above import Pipeline

            def area(factor: "Pipeline" = FACTOR):
                if factor:
                    from ..ops.late import double
                return double(factor * SIZE)
        """,
        ops_late="def double(x): return 2 * x",
    )
    names = {}
    exec(code, names)
    assert names["area"]() == 24
    assert not [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and node.level]


IMPORTING = "from ..ops.one import first\n"


@pytest.mark.parametrize(
    ("one", "model", "name"),
    [
        ("def first(): ...\ndef helper(): ...", "def helper(): ...", "helper"),
        ("first = 1\nclass Helper: ...", "Helper = 2", "Helper"),
        ("first = 1\nimport numpy as np", "import torch as np", "np"),
        ("first = 1\nfrom a import Tensor", "from b import Tensor", "Tensor"),
        ("first = 1\nfrom a import Tensor", "class Tensor: ...", "Tensor"),
        ("first = 1\nif first:\n    limit = 1", "for limit in (): ...", "limit"),
    ],
)
def test_a_name_with_two_meanings_is_an_error(join, one, model, name):
    with pytest.raises(ValueError, match=f"must not both define `{name}`"):
        join(ops_one=one, models_model=IMPORTING + model)


def test_the_same_import_in_two_modules_is_none(join):
    join(
        ops_one="first = 1\nimport a.b\nfrom c import d as e",
        models_model=IMPORTING + "import a.b\nfrom c import d as e",
    )


@pytest.mark.parametrize(
    "statement",
    [
        "from ..ops.one import first as second",
        "from ..ops import one",
        "from . import one",
        "from ..ops.missing import first",
        "from ...elsewhere import first",
    ],
)
def test_an_import_that_cannot_be_joined_is_an_error_that_names_its_line(join, statement):
    with pytest.raises(ValueError, match=r"model\.py, line 2: must be `from \.module import name`"):
        join(ops_one="first = 1", models_model=f"\n{statement}")


def test_modules_that_import_each_other_are_an_error(join):
    with pytest.raises(ValueError, match="imports itself by way of"):
        join(ops_one="from ..models.model import second\nfirst = 1", models_model=IMPORTING + "second = 2")


def test_an_import_of_the_future_is_an_error(join):
    with pytest.raises(ValueError, match="must be the first of a file"):
        join(models_model="from __future__ import annotations")
