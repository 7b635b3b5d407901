"""Proves where sampling settings come from, and that wrong ones are refused."""

import numpy as np
import pytest
import torch
from definitions import generators
from transformers import GenerationConfig

from dnd_hf.generation.settings import SamplingSettings


def test_arguments_left_out_come_from_the_generation_config(make_model):
    model = make_model()
    settings = dict(guidance_scale=1.3, temperature=0.8, top_k=6, top_p=0.9)
    explicit = model.generate([0, 1, 2], generator=generators(4, 5, 6), **settings)
    unset = model.generate([0, 1, 2], generator=generators(4, 5, 6))
    assert not torch.equal(explicit, unset)
    assert torch.equal(
        model.generate([0, 1, 2], generator=generators(4, 5, 6), generation_config=GenerationConfig(**settings)),
        explicit,
    )
    model.generation_config.update(**settings)
    assert torch.equal(model.generate([0, 1, 2], generator=generators(4, 5, 6)), explicit)
    back = dict(guidance_scale=2.0, temperature=1.0, top_k=0, top_p=1.0)
    assert torch.equal(model.generate([0, 1, 2], generator=generators(4, 5, 6), **back), unset)
    model.generation_config.do_sample = False
    assert torch.equal(model.generate([0, 1, 2]), model.generate([0, 1, 2], do_sample=False, guidance_scale=1.3))


@pytest.mark.parametrize("class_dropout_prob", [0.1, 0.0])
def test_an_empty_generation_config_means_plain_sampling_and_guidance_where_it_can_be(class_dropout_prob, make_model):
    model = make_model(class_dropout_prob=class_dropout_prob)
    plain = dict(temperature=1.0, top_k=0, top_p=1.0, do_sample=True)
    scale = 2.0 if class_dropout_prob else 1.0
    expected = model.generate([0, 1, 2], guidance_scale=scale, generator=generators(4, 5, 6), **plain)
    empty = model.generate([0, 1, 2], generator=generators(4, 5, 6), generation_config=GenerationConfig())
    assert torch.equal(empty, expected)
    assert torch.equal(model.generate([0, 1, 2], generator=generators(4, 5, 6)), expected)


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=np.float32(0.5), top_k=np.int64(6), top_p=np.float64(0.75), guidance_scale=np.int32(3)),
        dict(temperature=np.array([0.5, 0.5]), top_k=torch.tensor([6, 6]), top_p=(0.75, 0.75), guidance_scale=3),
        dict(temperature=torch.tensor(0.5), top_k=6.0, top_p=np.array(0.75), guidance_scale=3.0),
    ],
    ids=["numpy", "arrays", "scalars"],
)
def test_numbers_may_be_those_of_numpy_and_tensors(settings, make_model):
    model = make_model()
    expected = model.generate(
        [0, 1], generator=generators(1, 2), temperature=0.5, top_k=6, top_p=0.75, guidance_scale=3.0
    )
    assert torch.equal(model.generate([0, 1], generator=generators(1, 2), **settings), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", 1e300),
        ("guidance_scale", 10**400),
        ("temperature", 10**400),
        ("temperature", [1.0, np.nan]),
        ("top_k", 2.5),
        ("top_p", np.float32(1.5)),
        ("generation_config", {"temperature": 0.5}),
        ("guidance_schedule", "square"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(name, value, make_model):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        make_model().generate([0, 1], **{name: value})


@pytest.mark.parametrize(
    "wrong", [dict(guidance_scale=-1.0), dict(temperature=0.0), dict(top_k=-1), dict(top_p=1.5), dict(guidance_power=0)]
)
def test_settings_that_no_model_takes_are_refused_without_a_model(wrong):
    SamplingSettings.check(guidance_scale=3.0, temperature=0.5)
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        SamplingSettings.check(**wrong)
