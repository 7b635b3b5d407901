"""Proves generate(): cached decoding against whole prefixes, labels, the callback, calls that overlap."""

import numpy as np
import pytest
import torch
from definitions import generators, regenerate, uniforms_of


MODES = ("dnd", "vertical", "parallel")


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_cached_generation_is_that_of_whole_prefixes(mode, sampled, scale, make_model, decoder):
    model = make_model(depth_mode=mode, code_depth=3, num_key_value_heads=1)
    class_labels = torch.tensor([0, 3, 1])
    if sampled:
        codes = model.generate(class_labels, guidance_scale=scale, generator=generators(5, 6, 7))
        expected = regenerate(model, class_labels, scale, uniforms_of(model, 5, 6, 7))
    else:
        codes = model.generate(class_labels, guidance_scale=scale, do_sample=False)
        expected = regenerate(model, class_labels, scale)
    assert codes.shape == (3, 2, 3, 3) and codes.dtype == torch.int64
    assert len(expected.unique()) > 3
    assert torch.equal(codes, expected)


def test_labels_may_be_a_number_a_list_or_a_tensor(make_model):
    model = make_model()
    expected = model.generate(torch.tensor([2]), do_sample=False)
    for class_labels in (2, [2], torch.tensor(2), torch.tensor([2], dtype=torch.int32), np.array([2])):
        assert torch.equal(model.generate(class_labels, do_sample=False), expected)


def test_generation_runs_in_eval_mode_without_gradients_and_restores_the_mode(make_model):
    model = make_model(residual_dropout=0.5, embedding_dropout=0.5, class_dropout_prob=0.5)
    expected = model.generate([0, 1], do_sample=False)
    gradients = []
    model.layers[0].register_forward_hook(lambda _, __, output: gradients.append(output.requires_grad))
    assert torch.equal(model.train().generate([0, 1], do_sample=False), expected)
    assert model.training and model.layers[1].residual_dropout.training
    model.eval().generate([0])
    assert not model.training
    assert not any(gradients)

    def fail(position, codes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.train().generate([0], callback=fail)
    assert model.training


def test_callback_sees_every_cell_and_the_codes_so_far(make_model):
    model, steps = make_model(), []
    codes = model.generate([0, 1], callback=lambda position, codes: steps.append((position, codes.clone())))
    assert [position for position, _ in steps] == list(range(6))
    for position, so_far in steps:
        assert so_far.shape == codes.shape
        assert torch.equal(so_far.flatten(1, 2)[:, : position + 1], codes.flatten(1, 2)[:, : position + 1])
        assert (so_far.flatten(1, 2)[:, position + 1 :] == 0).all()
