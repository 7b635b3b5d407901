"""Proves that overlapping calls share evaluation mode and that the last one restores what each module was in."""

import pytest
from torch import nn

from dnd_hf.generation.evaluation_mode import evaluation_mode


def make_modules() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), nn.Dropout())
    model.train()[1][0].eval()
    return model


def modes(model) -> list[bool]:
    return [module.training for module in model.modules()]


def test_the_last_of_overlapping_calls_restores_each_module():
    model = make_modules()
    before = modes(model)
    first, second = evaluation_mode(model), evaluation_mode(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(modes(model))
    second.__exit__(None, None, None)
    assert modes(model) == before


def test_an_error_restores_it_too_and_other_models_are_left_alone():
    model, other = make_modules(), make_modules()
    before = modes(model)
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(modes(model)) and modes(other) == before
        raise KeyError
    assert modes(model) == before


def test_a_model_put_in_training_mode_meanwhile_is_in_evaluation_mode_for_the_next_call_and_training_after():
    model = make_modules().eval()
    with evaluation_mode(model):
        model.train()
        with evaluation_mode(model):
            assert not any(modes(model))
    assert all(modes(model))
