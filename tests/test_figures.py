"""dnd_hf.figures: what is drawn can be seen."""

import numpy as np
import pytest
from PIL import Image

from dnd_hf.figures import plot_training_curves


def colored(path, box: tuple[float, float, float, float]) -> int:
    """Pixels in the first color of matplotlib in a part of a plot (left, top, right, bottom; shares of its size)."""
    image = Image.open(path).convert("RGB")
    sizes = (image.width, image.height) * 2
    pixels = np.asarray(image.crop([round(share * size) for share, size in zip(box, sizes)]))
    return int((np.abs(pixels.astype(int) - (31, 119, 180)).max(-1) < 20).sum())


def test_the_loss_comes_first_and_large_and_a_single_point_can_be_seen(tmp_path):
    pytest.importorskip("matplotlib")
    speed = {f"train/{name}": 1.0 for name in ("images_per_second", "tokens_per_second", "mfu", "peak_memory_gb")}
    lines = [{"step": 10, "train/loss": 2.0, "train/loss_depth_1": 2.0, **speed}, {"step": 10, "validation/psnr": 20.0}]
    plot_training_curves(lines, tmp_path / "curves.png")
    large = [colored(tmp_path / "curves.png", (left, 0, left + 0.5, 0.45)) for left in (0, 0.5)]  # loss and psnr
    assert min(large) > 5

    plot_training_curves([{"step": 10, "train/loss": 2.0, **speed}], tmp_path / "loss.png")
    assert colored(tmp_path / "loss.png", (0, 0, 1, 0.6)) > 5


def test_no_metrics_are_no_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot_training_curves([], tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()
