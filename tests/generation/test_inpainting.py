"""inpaint: exact against enumeration of the posterior, where one particle is not; and what it shares with generate."""

import itertools

import pytest
import torch
from definitions import assert_frequencies
from scipy.stats import chisquare


@pytest.fixture(params=["dnd", "rq_transformer"])
def make(request, make_model, make_rq_model):
    """A function that makes a tiny model with codes of depth 2 and a null class."""
    if request.param == "rq_transformer":
        return lambda **overrides: make_rq_model(**{"code_depth": 2, "class_dropout_prob": 0.1, **overrides})
    return make_model


GIVEN = torch.tensor([[[0, 2], [1, 2], [0, 1]]])  # (1, 3, 2): a row of three cells
HOLES = {
    "a cell before a given one": [[0, 0], [1, 1], [1, 1]],
    "a deeper code, between given ones": [[1, 1], [1, 0], [1, 1]],
    "cells on both sides": [[0, 0], [1, 1], [0, 0]],
    "first codes below given second ones": [[0, 1], [0, 1], [1, 1]],
}


def posterior(model, mask, **settings) -> dict[tuple, float]:
    """The probabilities of all grids that agree with the given codes, by enumeration."""
    grids = torch.tensor(list(itertools.product(range(3), repeat=6))).view(-1, 1, 3, 2)
    grids = grids[((grids == GIVEN) | ~mask).all((1, 2, 3))]
    probabilities = model.score([1] * len(grids), grids).total.double().softmax(0)
    return {tuple(grid.flatten().tolist()): p.item() for grid, p in zip(grids, probabilities)}


def counts_of(codes) -> dict[tuple, int]:
    grids, counts = codes.flatten(1).unique(dim=0, return_counts=True)
    return {tuple(grid.tolist()): count.item() for grid, count in zip(grids, counts)}


@pytest.mark.parametrize("hole", HOLES.values(), ids=HOLES.keys())
def test_many_particles_have_the_exact_posterior(hole, make):
    model, total = make(vocab_size=3, grid_size=(1, 3)), 1500
    mask = torch.tensor(hole, dtype=torch.bool)[None]
    expected = posterior(model, mask)
    batch = GIVEN.expand(total, 1, 3, 2), mask.expand(total, 1, 3, 2)
    codes = model.inpaint([1] * total, *batch, num_particles=100, guidance_scale=1.0, generator=0)
    assert ((codes == GIVEN) | ~mask).all()
    assert_frequencies(counts_of(codes), expected, total)


def test_one_particle_has_another_distribution_than_the_posterior(make):
    model, total = make(vocab_size=3, grid_size=(1, 3)), 1500
    mask = torch.tensor(HOLES["a cell before a given one"], dtype=torch.bool)[None]
    expected = posterior(model, mask)
    batch = GIVEN.expand(total, 1, 3, 2), mask.expand(total, 1, 3, 2)
    counts = counts_of(model.inpaint([1] * total, *batch, num_particles=1, guidance_scale=1.0, generator=0))
    observed = [counts.get(outcome, 0) for outcome in expected]
    assert chisquare(observed, [p * total for p in expected.values()]).pvalue < 1e-6


@pytest.mark.parametrize("generator", [5, [5, 6]], ids=["seed", "seeds"])
def test_one_particle_is_generate_with_given_codes(generator, make, make_inputs):
    model = make()
    labels, codes = make_inputs(model)
    mask = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, 0, :2] = mask[:, 1, 1:] = True  # whole cells before, between and behind
    expected = model.generate(labels, codes=codes, codes_mask=mask, generator=generator, temperature=0.8)
    found = model.inpaint(labels, codes, mask, num_particles=1, generator=generator, temperature=0.8)
    assert torch.equal(found, expected)


def test_an_image_with_its_own_generator_does_not_depend_on_the_batch(make, make_inputs):
    model = make()
    labels, codes = make_inputs(model, batch=3)
    mask = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = model.inpaint(labels, codes, mask, num_particles=5, generator=[1, 2, 3])
    for i in range(3):
        alone = model.inpaint(labels[i], codes[i : i + 1], mask[i : i + 1], num_particles=5, generator=[i + 1])
        assert torch.equal(alone[0], whole[i])


def test_the_callback_sees_every_cell_and_may_end_the_sampling(make_model, make_inputs):
    model, seen = make_model(), []
    labels, codes = make_inputs(model)
    mask = torch.zeros_like(codes, dtype=torch.bool)
    mask[:, 1] = True

    def callback(cell, sampled):
        seen.append((cell, sampled.shape))
        return cell == 3

    codes = model.inpaint(labels, codes, mask, num_particles=3, callback=callback)
    assert seen == [(cell, (2, 2, 3, 2)) for cell in range(4)] and codes.shape == (2, 2, 3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_particles=0), "`num_particles` must be at least 1"),
        (dict(num_particles=1.5), "`num_particles` must be a whole number"),
        (dict(codes=None, codes_mask=None), "`codes` and `codes_mask` must be given"),
        (dict(codes_mask=torch.ones(1, 2, 3, 2)), "`codes_mask` must be booleans"),
        (dict(do_sample=False), "`do_sample` must not be False"),
        (dict(temperature=0), "`temperature` must be"),
        (dict(class_labels=[9]), "`class_labels` must lie in"),
    ],
)
def test_wrong_arguments_are_refused(options, message, make_model, make_inputs):
    model = make_model()
    _, codes = make_inputs(model, batch=1)
    arguments = dict(class_labels=[1], codes=codes, codes_mask=torch.zeros_like(codes, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        model.inpaint(**{**arguments, "num_particles": 2, **options})
