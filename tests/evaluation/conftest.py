"""Fixtures of the tests of evaluation."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def image_folder(tmp_path):
    """Five random images, 6 x 4 pixels (width x height)."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    levels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    names = ["0.png", "1.png", "2.png", "deeper/0.png", "deeper/1.png"]
    for name, array in zip(names, levels):
        Image.fromarray(array).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder, levels
