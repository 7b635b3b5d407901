"""Proves the filters: their order and their narrowest settings."""

import pytest
import torch
from definitions import generators, regenerate, uniforms_of


def test_filters_are_applied_in_the_order_temperature_top_k_top_p(make_model):
    model, class_labels = make_model(code_depth=3), torch.tensor([2, 0, 1, 3])
    filters = dict(temperature=1.8, top_k=5, top_p=0.75)
    codes = model.generate(class_labels, guidance_scale=1.5, generator=generators(1, 2, 3, 4), **filters)
    assert torch.equal(codes, regenerate(model, class_labels, 1.5, uniforms_of(model, 1, 2, 3, 4), **filters))


@pytest.mark.parametrize("filters", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)], ids=str)
def test_the_narrowest_filters_are_greedy(filters, make_model):
    model = make_model()
    greedy = model.generate([0, 1, 2], do_sample=False)
    assert torch.equal(model.generate([0, 1, 2], generator=generators(0)[0], **filters), greedy)
