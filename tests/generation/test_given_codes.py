"""Proves `generate(codes=, codes_mask=)`: given codes stay, and the others are drawn as if those had been drawn too."""

import itertools
from collections import Counter

import pytest
import torch
from definitions import assert_frequencies, generators, regenerate, uniforms_of


LARGER = dict(grid_size=(7, 10), num_attention_heads=4, num_key_value_heads=2)


def masks(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Masks of every kind for codes of this shape."""
    batch, height, width, depth = shape
    cells = torch.arange(height * width).view(1, height, width, 1).expand(shape)
    images = torch.arange(batch).view(batch, 1, 1, 1).expand(shape)
    depths = torch.arange(depth).expand(shape)
    middle = (cells > 0) & (cells < height * width - 2)
    return {
        "prefix": cells < height * width // 2,
        "prefixes of other lengths": cells < 1 + images,
        "suffix": cells >= height * width // 2,
        "middle": middle,
        "coarse codes": depths < 1,
        "finest codes": depths == depth - 1,
        "column": cells % width == 1,
        "random": torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5,
        "random cells": (torch.rand(height * width, generator=torch.Generator().manual_seed(4)) < 0.5)[cells],
    }


KINDS = list(masks((1, 1, 1, 1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["dnd", "vertical", "parallel"])
def test_given_codes_stay_and_the_others_follow_from_them(mode, kind, make_model, make_inputs, any_decoder):
    model = make_model(depth_mode=mode, code_depth=3, num_key_value_heads=1)
    labels, codes = make_inputs(model, batch=3)
    mask = masks(tuple(codes.shape))[kind]
    unread = codes.masked_fill(~mask, -100)
    for scale in (1.0, 2.5):
        options = dict(guidance_scale=scale, codes=unread, codes_mask=mask)
        given = dict(given=codes, mask=mask)
        greedy = model.generate(labels, do_sample=False, **options)
        assert torch.equal(greedy, regenerate(model, labels, scale, **given))
        sampled = model.generate(labels, generator=generators(5, 6, 7), **options)
        assert torch.equal(sampled, regenerate(model, labels, scale, uniforms_of(model, 5, 6, 7), **given))
        assert torch.equal(sampled[mask], codes[mask]) and not torch.equal(sampled, greedy)


@pytest.mark.parametrize("variant", [dict(), dict(prompt_length=4, prompt_vocab_size=7, class_dropout_prob=0.1)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rq_transformer_keeps_given_codes_too(kind, variant, make_rq_model, make_rq_inputs, any_decoder):
    model = make_rq_model(**variant)
    conditions, codes = make_rq_inputs(model)
    mask = masks(tuple(codes.shape))[kind]
    scale = 2.5 if model.config.has_null_class else 1
    sampled = model.generate(conditions, guidance_scale=scale, generator=generators(5, 6), codes=codes, codes_mask=mask)
    assert torch.equal(sampled, regenerate(model, conditions, scale, uniforms_of(model, 5, 6), codes, mask))


@pytest.mark.parametrize("kind", ["prefix", "random cells"])
def test_given_codes_on_grids_larger_than_a_step_of_the_cache(kind, make_model, make_inputs, any_decoder):
    model = make_model(**LARGER)
    labels, codes = make_inputs(model)
    mask = masks(tuple(codes.shape))[kind]
    for _ in range(2):
        sampled = model.generate(labels, generator=generators(5, 6), codes=codes, codes_mask=mask, guidance_scale=2.0)
        assert torch.equal(sampled, regenerate(model, labels, 2.0, uniforms_of(model, 5, 6), codes, mask))


def test_free_codes_have_the_distribution_of_the_model_given_those_before_them(make_model):
    model, total = make_model(vocab_size=3, grid_size=(1, 2)), 20_000
    for head in model.heads:
        head.weight.data *= 0.3  # no code too likely
    mask = torch.tensor([False, True, False, False]).view(1, 1, 2, 2).expand(total, -1, -1, -1)
    codes = torch.full((total, 1, 2, 2), 2)
    sampled = model.generate([1] * total, guidance_scale=1, generator=0, codes=codes, codes_mask=mask)
    counts = Counter(map(tuple, sampled.view(total, 4).tolist()))

    outcomes = [(a, 2, b, c) for a, b, c in itertools.product(range(3), repeat=3)]
    log_probs = model.score([1] * len(outcomes), torch.tensor(outcomes).view(-1, 1, 2, 2)).log_probs.flatten(1)
    probabilities = log_probs[:, [0, 2, 3]].sum(1).double().exp()
    torch.testing.assert_close(probabilities.sum().item(), 1.0, rtol=0, atol=1e-5)
    assert_frequencies(counts, dict(zip(outcomes, probabilities.tolist())), total)


def test_a_mask_that_is_false_everywhere_changes_nothing(make_model, make_inputs, any_decoder):
    model = make_model()
    labels, codes = make_inputs(model)
    expected = model.generate(labels, generator=3)
    none = torch.zeros(codes.shape, dtype=torch.bool)
    assert torch.equal(model.generate(labels, generator=3, codes=codes, codes_mask=none), expected)


def test_a_mask_that_is_true_everywhere_gives_the_codes_back_without_a_pass(make_model, make_inputs, any_decoder):
    model, passes, seen = make_model(), [], []
    labels, codes = make_inputs(model)
    model.embed_classes.register_forward_hook(lambda *_: passes.append(1))
    everywhere = torch.ones(codes.shape, dtype=torch.bool)
    kept = model.generate(labels, codes=codes, codes_mask=everywhere, callback=lambda cell, _: seen.append(cell))
    assert torch.equal(kept, codes) and not passes
    assert seen == list(range(6))


def test_a_code_that_is_sampled_draws_with_the_number_that_it_has_without_given_codes(make_model):
    """With a model that does not look at the codes, given codes change no other."""
    model = make_model(depth_mode="parallel")
    model.embed_tokens.weight.data.zero_()
    for layer in model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    free = model.generate([0, 1], generator=generators(1, 2))
    mask = masks(tuple(free.shape))["random"]
    kept = model.generate([0, 1], generator=generators(1, 2), codes=torch.zeros_like(free), codes_mask=mask)
    assert torch.equal(kept, free.masked_fill(mask, 0)) and not torch.equal(kept, free)


def test_given_cells_cost_no_pass_of_their_own(make_model, make_inputs):
    model, seen = make_model(grid_size=(2, 5)), []
    labels, codes = make_inputs(model)
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for whole, tokens in (
        (range(4), [5, 1, 1, 1, 1, 1]),
        (range(1, 10), [1]),
        ((1, 2, 5, 9), [1, 3, 1, 2, 1, 1]),
    ):
        seen.clear()
        mask = torch.zeros(2, 10, 2, dtype=torch.bool)
        mask[:, list(whole)] = True
        model.generate(labels, codes=codes, codes_mask=mask.view(codes.shape))
        assert seen == tokens


def test_the_callback_sees_given_codes_behind_the_cell(make_model, make_inputs, any_decoder):
    model, seen = make_model(), []
    labels, codes = make_inputs(model)
    codes = codes.clamp(min=1)
    mask = masks(tuple(codes.shape))["random"]
    options = dict(generator=(1, 2), codes=codes, codes_mask=mask)
    done = model.generate(labels, callback=lambda cell, so_far: seen.append(so_far.clone()), **options)
    assert len(seen) == 6
    for cell, so_far in enumerate(seen):
        before = torch.arange(6).view(1, 2, 3, 1) <= cell
        assert torch.equal(so_far, torch.where(before, done, codes.masked_fill(~mask, 0)))
    stopped = model.generate(labels, callback=lambda cell, _: cell == 2, **options)
    assert torch.equal(stopped, seen[2])


def test_given_codes_may_be_lists_and_arrays(make_model, make_inputs):
    model = make_model()
    labels, codes = make_inputs(model)
    mask = masks(tuple(codes.shape))["random"]
    expected = model.generate(labels, do_sample=False, codes=codes, codes_mask=mask)
    for convert in (torch.Tensor.numpy, torch.Tensor.tolist):
        assert torch.equal(
            model.generate(labels, do_sample=False, codes=convert(codes), codes_mask=convert(mask)), expected
        )
    assert torch.equal(model.generate(labels, do_sample=False, codes=codes.int(), codes_mask=mask), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(codes=None), "`codes` and `codes_mask` must be given together"),
        (dict(codes_mask=None), "`codes` and `codes_mask` must be given together"),
        (dict(codes=torch.zeros(2, 2, 3, 3).long()), r"`codes` must have shape \(2, 2, 3, 2\), got \(2, 2, 3, 3\)"),
        (dict(codes=torch.zeros(1, 2, 3, 2).long()), r"`codes` must have shape \(2, 2, 3, 2\)"),
        (dict(codes=torch.zeros(2, 2, 3, 2)), "`codes` must be integers"),
        (dict(codes=torch.full((2, 2, 3, 2), 11)), r"`codes` must lie in \[0, 11\)"),
        (dict(codes=torch.full((2, 2, 3, 2), -1)), r"`codes` must lie in \[0, 11\)"),
        (dict(codes_mask=torch.ones(2, 2, 3).bool()), r"`codes_mask` must have shape \(2, 2, 3, 2\)"),
        (dict(codes_mask=torch.ones(2, 2, 3, 2).long()), "`codes_mask` must be booleans"),
    ],
    ids=str,
)
def test_wrong_codes_and_masks_are_refused_before_any_work(change, message, make_model):
    model, (generator,) = make_model(), generators(3)
    state = generator.get_state()
    right = dict(codes=torch.zeros(2, 2, 3, 2).long(), codes_mask=torch.ones(2, 2, 3, 2).bool())
    with pytest.raises(ValueError, match=message):
        model.generate([0, 1], generator=generator, **{**right, **change})
    assert torch.equal(generator.get_state(), state)
