"""dnd_hf.figures: what is drawn can be seen."""

import numpy as np
import pytest
from PIL import Image

from dnd_hf.figures import markdown_table, plot_codes, plot_curves, plot_training_curves, save_image_grid


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


def test_a_table_has_the_columns_that_someone_fills_and_escapes_bars():
    rows = [{"a": 1.23456789, "b": None, "c": "x|y"}, {"a": 2, "b": None, "d": 0.5}]
    assert markdown_table(rows) == "| a | c |\n|---|---|\n| 1.2346 | x\\|y |\n| 2 |  |"
    assert markdown_table(rows, ["d", "a"], digits=2) == "| d | a |\n|---|---|\n|  | 1.2 |\n| 0.5 | 2 |"


def test_a_grid_is_filled_row_by_row_and_then_with_black(tmp_path):
    images = [Image.new("RGB", (3, 2), (level, level, level)) for level in (50, 100, 150)]
    save_image_grid(images, 2, tmp_path / "new" / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))[..., 0]
    assert grid.shape == (4, 6) and grid[::2, ::3].tolist() == [[50, 100], [150, 0]]


def test_curves_over_models_and_uses_of_codes_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"model": model, "depth": depth, "psnr": 20 + depth, "rfid": None} for model in "ab" for depth in (1, 2)]
    plot_curves(rows, "depth", ["psnr", "rfid"], tmp_path / "curves.png")
    one_panel = Image.open(tmp_path / "curves.png")
    assert one_panel.width == 400 and colored(tmp_path / "curves.png", (0, 0, 1, 1)) > 50
    codes = [{"depth": 1, "usage": 0.5, "norm_quantiles": [1, 2, 3, 4, 5], "norm_mean": 3.0}]
    plot_codes(codes, tmp_path / "codes.png")
    bar = colored(tmp_path / "codes.png", (0, 0, 0.5, 1))
    plot_codes([{**codes[0], "usage": 0.25}], tmp_path / "half.png")
    assert colored(tmp_path / "half.png", (0, 0, 0.5, 1)) == pytest.approx(bar / 2, rel=0.05)
