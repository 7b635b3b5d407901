"""inpaint: exact against enumeration of the posterior, where one particle is not; and what it shares with generate."""

import itertools

import pytest
import torch
from definitions import assert_frequencies, guided_logits
from scipy.stats import chisquare

from dnd_hf.generation import inpainting


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


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_layers_that_run_as_they_are_give_the_codes_of_packed_ones(scale, make, make_inputs, monkeypatch):
    model = make()
    labels, codes = make_inputs(model, batch=20)
    mask = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = model.inpaint(labels, codes, mask, num_particles=8, guidance_scale=scale, generator=0)
    monkeypatch.setattr(inpainting, "can_run_packed", lambda model: False)
    found = model.inpaint(labels, codes, mask, num_particles=8, guidance_scale=scale, generator=0)
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_particles_that_were_resampled_continue_from_their_own_past(scale, packed, make, make_inputs, monkeypatch):
    """The codes of a resampled particle must be weighed as a whole pass over them weighs them."""
    model, seen = make(), {}
    monkeypatch.setattr(inpainting, "can_run_packed", lambda model: packed)
    labels, codes = make_inputs(model, batch=4)
    mask = torch.zeros_like(codes, dtype=torch.bool)
    mask[:, :, 1] = True

    def resample(loop, cell):
        if cell == 1:
            loop.log_weights_BN[:, [2, 4]] += 1000  # so that only these two are left
        met = loop.log_weights_BN.clone(), loop.codes_up_to(cell).clone()
        original(loop, cell)
        seen[cell] = (*met, loop.log_weights_BN.clone())

    original = inpainting.ParticleLoop.resample
    monkeypatch.setattr(inpainting.ParticleLoop, "resample", resample)
    model.inpaint(labels, codes, mask, num_particles=6, guidance_scale=scale, generator=0)
    assert (seen[1][2] == 0).all()
    weights, sampled, _ = seen[4]
    logits = guided_logits(model, labels.repeat_interleave(6), sampled, scale)
    log_probs = logits.log_softmax(-1)[:, 4].gather(-1, sampled.flatten(1, 2)[:, 4, :, None])
    torch.testing.assert_close(weights - seen[3][2], log_probs.sum((1, 2)).view(4, 6), rtol=0, atol=1e-4)
