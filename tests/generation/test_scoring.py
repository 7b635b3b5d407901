"""Proves score() and code_distributions(): against enumeration, against forward, in pieces, both architectures."""

import itertools

import pytest
import torch
from definitions import generators

from dnd_hf.generation import scoring


@pytest.fixture(params=["dnd", "vertical", "parallel", "rq_transformer"])
def make(request, make_model, make_rq_model):
    """A function that makes a tiny model of an architecture, with codes of depth 2 and a null class."""
    if request.param == "rq_transformer":
        return lambda **overrides: make_rq_model(**{"code_depth": 2, "class_dropout_prob": 0.1, **overrides})
    return lambda **overrides: make_model(depth_mode=request.param, **overrides)


def test_the_scores_of_all_grids_are_a_distribution_and_that_of_sampling(make):
    model = make(vocab_size=3, grid_size=(1, 2))
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(81, 1, 2, 2)
    probabilities = model.score([1] * 81, grids).total.exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    total = 20_000
    codes = model.generate([1] * total, guidance_scale=1.0, generator=generators(0)[0])
    counts = torch.bincount((codes.flatten(1) @ torch.tensor([27, 9, 3, 1])), minlength=81)
    spread = (total * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - total * probabilities).abs() <= 5 * spread + 1).all()


@torch.no_grad()
def test_a_score_is_the_log_probability_of_each_code_given_those_before_it(make, make_inputs):
    model = make()
    labels, codes = make_inputs(model, batch=5)
    output = model.score(labels, codes)
    logits = model.double()(labels, codes).logits.view(5, 2, 3, 2, 11)
    expected = logits.log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)
    torch.testing.assert_close(output.log_probs.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.total.double(), expected.sum((1, 2, 3)), rtol=0, atol=1e-4)
    assert output.log_probs.dtype == output.total.dtype == torch.float32


def test_a_score_without_labels_is_that_of_the_null_class(make, make_inputs):
    model = make()
    _, codes = make_inputs(model)
    with torch.no_grad():
        logits = model(torch.tensor([4, 4]), codes).logits.view(2, 2, 3, 2, 11)
    expected = logits.log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)
    torch.testing.assert_close(model.score(None, codes).log_probs, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="`class_labels` must be given"):
        make(class_dropout_prob=0.0).score(None, codes)


def test_pieces_and_batches_give_the_same_scores_and_never_more_logits_than_a_piece(make, make_inputs, monkeypatch):
    model, seen = make(), []
    labels, codes = make_inputs(model, batch=7)
    expected = model.score(labels, codes).log_probs
    for head in model.heads:
        head.register_forward_hook(lambda head, args, output: seen.append(output.numel()))
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 60)
    for batch_size in (1, 3, 64):
        seen.clear()
        log_probs = model.score(labels, codes, batch_size=batch_size).log_probs
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)
        assert max(seen) <= 60 and sum(seen) == 7 * 6 * 2 * 11


def test_scores_of_a_model_in_training_mode_are_without_dropout_and_gradients(make, make_inputs):
    model = make(residual_dropout=0.5, embedding_dropout=0.5, class_dropout_prob=0.5)
    labels, codes = make_inputs(model)
    expected = model.score(labels, codes)
    output = model.train().score(labels, codes)
    assert torch.equal(output.log_probs, expected.log_probs) and not output.total.requires_grad
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("codes", lambda labels, codes: (labels, codes[:, :1])),
        ("codes", lambda labels, codes: (labels, codes.float())),
        ("codes", lambda labels, codes: (labels, codes + 11)),
        ("codes", lambda labels, codes: (labels, codes - 11)),
        ("codes", lambda labels, codes: (labels[:0], codes[:0])),
        ("class_labels", lambda labels, codes: (labels[:1], codes)),
        ("class_labels", lambda labels, codes: (labels + 4, codes)),
        ("class_labels", lambda labels, codes: (labels.float(), codes)),
    ],
)
def test_wrong_labels_and_codes_are_refused_by_name(argument, change, make, make_inputs):
    model = make()
    labels, codes = change(*make_inputs(model))
    with pytest.raises(ValueError, match=f"`{argument}` must"):
        model.score(labels, codes)
    with pytest.raises(ValueError, match="`batch_size` must be"):
        model.score(*make_inputs(model), batch_size=0)


@torch.no_grad()
@pytest.mark.parametrize("logits_at_once", [60, 10**6])
def test_distributions_are_those_of_forward_by_their_definitions(logits_at_once, make, make_inputs, monkeypatch):
    model = make()
    labels, codes = make_inputs(model, batch=3)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", logits_at_once)
    output = model.code_distributions(labels, codes, num_top_codes=4)
    assert torch.equal(output.log_probs, model.score(labels, codes).log_probs)
    probabilities = model.double()(labels, codes).logits.view(3, 2, 3, 2, 11).softmax(-1)
    entropies = -(probabilities * probabilities.log()).sum(-1)
    torch.testing.assert_close(output.entropies.double(), entropies, rtol=0, atol=1e-5)
    ranked = probabilities.argsort(-1, descending=True)[..., :4]
    assert torch.equal(output.top_codes, ranked)
    torch.testing.assert_close(output.top_log_probs.double(), probabilities.gather(-1, ranked).log(), rtol=0, atol=1e-5)
    assert output.entropies.dtype == output.top_log_probs.dtype == torch.float32


def test_distributions_of_codes_that_cannot_come_are_finite_but_those_of_broken_weights_are_not(make, make_inputs):
    model = make()
    labels, codes = make_inputs(model)
    with torch.no_grad():
        for head in model.heads:
            head.weight.mul_(1e4)
    assert model.code_distributions(labels, codes).entropies.isfinite().all()
    with torch.no_grad():
        model.heads[0].weight.fill_(torch.nan)
    assert model.code_distributions(labels, codes).entropies[..., 0].isnan().all()


def test_distributions_need_a_number_of_top_codes_that_the_codebook_has(make, make_inputs):
    model = make()
    for wrong in (0, 12, 1.5):
        with pytest.raises(ValueError, match="`num_top_codes` must be"):
            model.code_distributions(*make_inputs(model), num_top_codes=wrong)
    assert model.code_distributions(None, make_inputs(model)[1], num_top_codes=11).top_codes.shape == (2, 2, 3, 2, 11)
