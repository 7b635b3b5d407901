"""Proves where sampling settings come from, and that wrong ones are refused."""

import pytest
import torch
from definitions import generators
from transformers import GenerationConfig


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
