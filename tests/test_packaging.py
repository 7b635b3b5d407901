"""The wheel and the source distribution: what is in them, and that an installed wheel works by itself."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest


REPOSITORY = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site", "output")


def run(*command: str, **options) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> SimpleNamespace:
    """A source distribution of a clean copy of the repository, and a wheel of each, made without the network."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(REPOSITORY, folder / "copy", ignore=NOT_COPIED)
    build = "from setuptools.build_meta import build_sdist; build_sdist('../sdist')"
    run("-c", build, cwd=folder / "copy")
    (sdist,) = (folder / "sdist").iterdir()
    wheels = []
    for name, source in (("of_sdist", sdist), ("of_copy", folder / "copy")):
        pip = ("-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation")
        run(*pip, "-w", str(folder / name), str(source), cwd=folder)
        (wheel,) = (folder / name).iterdir()
        wheels.append(wheel)
    return SimpleNamespace(folder=folder, sdist=sdist, wheel_of_sdist=wheels[0], wheel=wheels[1])


def files(root: Path, *folders: str) -> set[str]:
    found = [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix() for path in found if "__pycache__" not in path.parts}


def test_a_wheel_holds_every_file_of_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built.wheel) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == files(REPOSITORY, "dnd_hf")
    assert {"dnd_hf/py.typed", "dnd_hf/bundled/words/model_index.json", "dnd_hf/conversion/imagenet_labels.json"} < held


def test_a_wheel_of_the_source_distribution_is_the_same(built):
    contents = []
    for wheel in (built.wheel, built.wheel_of_sdist):
        with zipfile.ZipFile(wheel) as opened:
            contents.append({info.filename: info.CRC for info in opened.infolist() if "RECORD" not in info.filename})
    assert contents[0] == contents[1]


def test_the_source_distribution_holds_examples_docs_and_tests(built):
    with tarfile.open(built.sdist) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    expected = {name for name in files(REPOSITORY, "dnd_hf", "docs", "examples", "tests") if "/." not in name}
    assert expected <= held
    assert {"constraints.txt", "LICENSE", "README.md"} <= held


def test_the_metadata_state_licence_versions_and_links(built):
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = wheel.read(name).decode().splitlines()
    assert "License-Expression: Apache-2.0" in metadata and "License-File: LICENSE" in metadata
    assert "Requires-Python: >=3.11" in metadata and "Classifier: Programming Language :: Python :: 3.11" in metadata
    assert "Classifier: Typing :: Typed" in metadata
    assert "Project-URL: Paper, https://arxiv.org/abs/2410.01912" in metadata
    assert not [line for line in metadata if line.startswith("Classifier: License")]


def test_an_installed_wheel_makes_images_with_its_bundled_model_and_saves_pipelines(built, tmp_path):
    target = built.folder / "target"
    pip = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target))
    run(*pip, str(built.wheel_of_sdist))
    program = """
        import sys
        from pathlib import Path

        import dnd_hf

        assert Path(dnd_hf.__file__).is_relative_to(sys.argv[1]), dnd_hf.__file__
        pipe = dnd_hf.DnDPipeline.from_pretrained(dnd_hf.bundled_checkpoint("words"))
        pipe("QUEEN", generator=0).images[0].save("queen.png")
        pipe.save_pretrained("saved")
    """
    environment = {**os.environ, "PYTHONPATH": str(target)}
    run("-c", dedent(program), str(target), cwd=tmp_path, env=environment)
    assert (tmp_path / "queen.png").stat().st_size > 500
    assert {"pipeline.py", "modeling_dnd.py"} <= {path.name for path in (tmp_path / "saved").iterdir()}
