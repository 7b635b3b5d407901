"""examples/reproduce_paper.py: whole, from a Hub's files to the metrics, at small size with the official stand-ins."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from hub_stand_in import HubStandIn, Repository, blob_id
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

from dnd_hf import DnDPipeline
from dnd_hf.command_line import parse_arguments


REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "reproduce_paper.py"
STAND_INS = REPOSITORY / "tests" / "fixtures" / "imagenet_depth2"
FOLDERS = {
    "transformer.pt": "trained_dnd_transformer_imagenet_2layer/XXL",
    "rqvae.pt": "2d_tokenzier_imagenet",
    "config.yaml": "2d_tokenzier_imagenet",
}
SMALL = "--feature_model vit --batch_size 4 --num_workers 0 --output_dir out"


@pytest.fixture(scope="module")
def hub():
    """A Hub with the official repository, whose files are the small stand-ins."""
    official = Repository("leonardPKU/DnD-Transformer")
    files = {}
    for name, folder in FOLDERS.items():
        content = (STAND_INS / name).read_bytes()
        official.blobs[blob_id(content)] = content
        files[f"{folder}/{name}"] = ("regular", blob_id(content))
    official.commits.append(files)
    hub = HubStandIn()
    hub.repositories[official.name] = official
    with hub.running():
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    """With a reference batch of ten random images, and a tiny image model with random weights."""
    np.savez(tmp_path / "batch.npz", arr_0=np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8))
    torch.manual_seed(0)
    sizes = dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    Dinov2Model(Dinov2Config(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    return tmp_path


def reproduce(folder: Path, options: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs the script in `folder` as a user would."""
    settings = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL.split(), *options.split()],
        cwd=folder,
        env=os.environ | environment | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_from_a_hub_id_to_the_metrics_on_all_processes_of_a_machine(hub, folder, tmp_path_factory):
    environment = hub.environment(tmp_path_factory.mktemp("home"))
    reference = (folder / "batch.npz").as_uri()  # downloaded as from the web
    options = f"--checkpoint imagenet-xxl --num_images 20 --num_processes 2 --reference {reference}"
    done = reproduce(folder, options, environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert hub.unknown_requests == []

    results = json.loads((folder / "out" / "results.json").read_text())
    (row,) = results["rows"]
    assert row["num_images"] == 20 and row["fid"] > 0 and results["sampling"] == {"guidance_scale": 2.0}
    table = [line.strip("|").split("|") for line in done.stdout.splitlines() if re.match(r"\| (here|paper) ", line)]
    here, paper = ([cell.strip() for cell in line] for line in table)
    assert here[:2] == ["here", "20"] and float(here[4]) == pytest.approx(row["fid"], rel=1e-4)
    assert paper == ["paper", "50000", "2", "Inception of 2015", "2.58", "295.6", "0.83", "0.56"]
    assert "cannot be compared with the paper's" in done.stdout

    # Every image is that of its label and its seed, of the converted official weights.
    pipe = DnDPipeline.from_pretrained(folder / "out" / "pipeline")
    (samples,) = (folder / "out" / "samples").glob("*.npz")
    with np.load(samples) as arrays:
        images = arrays["arr_0"]
    assert images.shape == (20, 8, 8, 3)
    for i in (0, 13):
        alone = pipe(i % 10, generator=torch.Generator().manual_seed(i), guidance_scale=2.0).images[0]
        assert (images[i] == np.asarray(alone)).all()
    (grid,) = (folder / "out" / "samples").glob("*.png")
    assert Image.open(grid).size == (8 * 8, 3 * 8)


@pytest.fixture
def script():
    yield runpy.run_path(str(SCRIPT))
    PartialState._reset_state()  # other tests choose their own device


def test_local_files_need_no_hub_and_what_is_there_is_not_made_again(script, folder, monkeypatch):
    monkeypatch.chdir(folder)
    local = f"--transformer_checkpoint {STAND_INS / 'transformer.pt'} --rqvae_checkpoint {STAND_INS / 'rqvae.pt'}"
    options = f"{local} {SMALL} --checkpoint imagenet-xxxl --reference batch.npz"

    def run(num_images: int) -> dict[Path, int]:
        arguments = f"{options} --num_images {num_images}".split()
        script["main"](parse_arguments(script["ReproductionArguments"], arguments))
        return {path: path.stat().st_mtime_ns for path in (folder / "out" / "pipeline").rglob("*")}

    assert run(10) == run(20)
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["sampling"] == {"guidance_scale": 1.7} and results["rows"][0]["num_images"] == 20


def test_a_folder_without_one_checkpoint_is_listed(script, monkeypatch):
    find = script["find_official_file"]
    files = ["XXL/a.pt", "XXL/b.pt", "XXXL/README.md", "XXL-old/c.pt"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repository: files)
    with pytest.raises(ValueError, match=r"one checkpoint in XXL, has \['XXL/a.pt', 'XXL/b.pt'\]"):
        find("me/official", "XXL")
    with pytest.raises(ValueError, match=r"one checkpoint in XXXL, has \['XXXL/README.md'\]"):
        find("me/official", "XXXL")
