"""docs/training.md: its commands lead from a folder of images to a published pipeline."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from hub_stand_in import HubStandIn
from PIL import Image

from dnd_hf.data.words import WordImages


REPOSITORY = Path(__file__).parents[1]
SHORTER = "--max_train_steps 2 --train_batch_size 4 --num_validation_images 4 --num_samples 4"
LAUNCHERS = {"accelerate launch": f"{sys.executable} -m accelerate.commands.launch --cpu", "python": sys.executable}


def test_the_commands_lead_from_images_to_a_published_pipeline(tmp_path):
    words = WordImages(16, height=64, width=96)
    for i in range(16):
        path = tmp_path / "my-images" / ("cat", "dog")[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        words[i]["image"].save(path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    (block,) = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs" / "training.md").read_text(), flags=re.DOTALL)
    commands = block.replace("\\\n", " ").replace("you/model", "me/model").strip().splitlines()
    assert [re.search(r"examples/(\w+)\.py", line)[1] for line in commands] == [
        "train_rqvae", "extract_codes", "train", "generate"
    ]  # fmt: skip

    hub = HubStandIn()
    environment = os.environ | hub.environment(tmp_path / "home")
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with hub.running():
        for line in commands:
            for launcher, here in LAUNCHERS.items():
                line = re.sub(f"^{launcher} ", f"{here} ", line)
            if "examples/train" in line:
                line += f" {SHORTER}" if "train.py" in line else f" {SHORTER.rsplit(' --', 1)[0]}"
            done = subprocess.run(
                shlex.split(line), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, done.stderr[-4000:]
    files = hub.repositories["me/model"].files
    assert {"README.md", "model_index.json", "transformer/model.safetensors", "samples/step-2.png"} <= set(files)
    assert b"license: apache-2.0" in hub.repositories["me/model"].read("README.md")
    assert Image.open(tmp_path / "grid.png").size == (64, 2 * 64)
