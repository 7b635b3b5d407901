"""Features of samples, their metrics, and the choice of guidance."""

import json

import numpy as np
import pytest
import torch

from dnd_hf.evaluation.features import Features, frechet_distance, inception_score, precision_recall
from dnd_hf.evaluation.generation import (
    choose_presets,
    extract_features,
    gaussian,
    guidance_settings,
    measure_samples,
    read_reference_statistics,
)
from dnd_hf.evaluation.images import SampleImages


def corner(images: torch.Tensor) -> Features:
    return Features(images[:, :, 0, 0].float(), images[:, 0, 0].float() / 50)


def test_features_of_all_images_are_those_of_each_whatever_the_batch(image_folder):
    folder, levels = image_folder
    failures = []
    features, logits = extract_features(corner, SampleImages(folder), 2, failures)
    assert features.tolist() == levels[:, 0, 0].tolist() and failures == []
    torch.testing.assert_close(logits, torch.from_numpy(levels[:, 0, :, 0]) / 50)


def test_samples_are_measured_against_features_or_known_statistics(tmp_path):
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(30, 3, generator=generator) + shift for shift in (0.0, 0.5))
    logits = torch.randn(30, 4, generator=generator)
    found = measure_samples(Features(fake, logits), Features(real, None))
    assert found["fid"] == pytest.approx(frechet_distance(gaussian(fake), gaussian(real)))
    assert (found["precision"], found["recall"]) == pytest.approx(precision_recall(real, fake))
    assert (found["inception_score"], found["inception_score_std"]) == pytest.approx(inception_score(logits))
    assert found["num_images"] == 30
    np.savez(tmp_path / "reference.npz", mu=real.mean(0).numpy(), sigma=np.cov(real.T.double().numpy()))
    statistics = read_reference_statistics(tmp_path / "reference.npz")
    known = measure_samples(Features(fake, None), None, statistics)
    assert known["fid"] == pytest.approx(found["fid"], rel=1e-4)
    assert known["precision"] is known["inception_score"] is None
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((1, 4, 4, 3), np.uint8))
    assert read_reference_statistics(tmp_path / "images.npz") is None
    with pytest.raises(ValueError, match="needs features or statistics of real images"):
        measure_samples(Features(fake, None), None)


def test_guidance_settings_are_all_combinations_with_powers_where_they_matter():
    settings = guidance_settings([1.5, 2.0], ["constant", "power-cosine"], [1.2, 2.75])
    assert len(settings) == 2 + 4 and all(len(setting) == 2 for setting in settings[:2])
    assert {setting["guidance_power"] for setting in settings[2:]} == {1.2, 2.75}
    assert settings[0] == {"guidance_scale": 1.5, "guidance_schedule": "constant"}


def test_presets_are_the_lowest_fid_and_the_highest_precision():
    rows = [
        {"guidance_scale": 1.5, "guidance_schedule": "constant", "fid": 3.0, "precision": 0.7},
        {"guidance_scale": 2.0, "guidance_schedule": "constant", "fid": 2.6, "precision": 0.8},
        {
            "guidance_scale": 6.0,
            "guidance_schedule": "power-cosine",
            "guidance_power": 1.2,
            "fid": 9.0,
            "precision": 0.9,
        },
        {"guidance_scale": 4.0, "guidance_schedule": "constant", "fid": 6.5, "precision": 0.9},
    ]
    assert choose_presets(rows) == {
        "fid": {"guidance_scale": 2.0, "guidance_schedule": "constant"},
        "visual": {"guidance_scale": 4.0, "guidance_schedule": "constant"},
    }
    rows[3]["fid"] = 9.5
    assert choose_presets(rows)["visual"]["guidance_power"] == 1.2
    assert json.loads(json.dumps(choose_presets(rows))) == choose_presets(rows)
