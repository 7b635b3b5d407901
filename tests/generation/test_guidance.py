"""Proves guidance: its formula, its schedules."""

import math

import pytest
import torch
from definitions import regenerate


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_guidance_is_null_plus_scaled_difference(scale, make_model):
    model, class_labels = make_model(), torch.arange(4)
    guided = model.generate(class_labels, guidance_scale=scale, do_sample=False)
    assert torch.equal(guided, regenerate(model, class_labels, scale))
    if scale == 0:  # the class has no say: all images are one
        assert (guided == guided[:1]).all()
    else:
        assert not torch.equal(guided, model.generate(class_labels, guidance_scale=1.0, do_sample=False))


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"guidance_schedule": "linear"}, [1 + 6 * t / 6 for t in range(6)]),
        (
            {"guidance_schedule": "power-cosine", "guidance_power": 1},
            [4 - 3 * math.cos(t * math.pi / 6) for t in range(6)],
        ),
        ({"guidance_schedule": "power-cosine"}, [4 - 3 * math.cos(math.pi * (t / 6) ** 2.75) for t in range(6)]),
        ({"guidance_schedule": "constant", "guidance_power": 3}, [7] * 6),
    ],
)
def test_guidance_grows_as_its_schedule_says(settings, scales, make_model):
    model, class_labels = make_model(), torch.arange(4)
    guided = model.generate(class_labels, guidance_scale=7.0, do_sample=False, **settings)
    assert torch.equal(guided, regenerate(model, class_labels, scales))
    model.generation_config.update(guidance_scale=7.0)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert torch.equal(model.generate(class_labels, do_sample=False), guided)
