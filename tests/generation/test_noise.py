"""Proves how codes are drawn: their distribution, and what generators and seeds decide."""

from collections import Counter

import numpy as np
import pytest
import torch
from definitions import assert_frequencies, filtered, generators, guided_logits

from dnd_hf.generation.noise import draw


def test_draw_takes_the_first_code_whose_cumulative_probability_exceeds_the_uniform():
    logits = torch.tensor([0.25, 0.5, 0.0, 0.25]).log().repeat(7, 1)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [0, 0, 1, 1, 3, 3, 1]
    only_last = torch.tensor([[-torch.inf, -torch.inf, 3.0]])
    assert draw(only_last, torch.zeros(1, dtype=torch.float64)).item() == 2
    first_alone = torch.tensor([[3.0, -torch.inf, -torch.inf]])
    assert draw(first_alone, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 0


def test_drawn_frequencies_are_the_softmax():
    total = 200_000
    logits = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 2
    logits[5] = -torch.inf
    uniform = torch.rand(total, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = Counter(draw(logits.expand(total, -1), uniform).tolist())
    probabilities = logits.double().softmax(-1).tolist()
    assert_frequencies(counts, dict(enumerate(probabilities)), total)


@pytest.mark.parametrize(
    "filters",
    [
        dict(),
        dict(temperature=0.6),
        dict(temperature=1.7),
        dict(top_k=3),
        dict(top_k=100),
        dict(top_p=0.7),
        dict(temperature=1.5, top_k=6, top_p=0.8),
        dict(temperature=[0.7, 1.6], top_k=[0, 4], top_p=[0.9, 1.0]),
        dict(temperature=(2.0, 0.5), top_k=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sampled_frequencies_are_the_filtered_softmax_at_every_depth(filters, scale, make_model):
    # One cell of two codes: the joint distribution is p(first) p(second | first), with the filters of each depth.
    model, total = make_model(grid_size=(1, 1), seed=2), 20_000
    for head in model.heads:
        head.weight.data *= 0.3  # no code too likely
    codes = model.generate(
        torch.zeros(total, dtype=torch.long), guidance_scale=scale, generator=generators(0)[0], **filters
    )
    counts = Counter(map(tuple, codes.view(total, 2).tolist()))

    at_depth = [
        {name: value[k] if isinstance(value, (list, tuple)) else value for name, value in filters.items()}
        for k in range(2)
    ]
    every_first = torch.zeros(11, 1, 1, 2, dtype=torch.long)
    every_first[..., 0] = torch.arange(11)[:, None, None]
    logits = guided_logits(model, torch.zeros(11, dtype=torch.long), every_first, scale)
    first = filtered(logits[0, 0, 0], **at_depth[0])
    second = filtered(logits[:, 0, 1], **at_depth[1])
    joint = {(i, j): first[i] * second[i, j] for i in range(11) for j in range(11)}
    assert_frequencies(counts, joint, total)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_image_with_its_own_generator_does_not_depend_on_the_batch(scale, make_model):
    model = make_model()
    whole = model.generate([0, 1, 2, 3, 1], guidance_scale=scale, generator=generators(9, 8, 7, 6, 5))
    for index, (label, seed) in enumerate(zip([0, 1, 2, 3, 1], [9, 8, 7, 6, 5])):
        alone = model.generate([label], guidance_scale=scale, generator=generators(seed))
        assert torch.equal(alone[0], whole[index])
    turned = model.generate([1, 3, 2, 1, 0], guidance_scale=scale, generator=generators(5, 6, 7, 8, 9))
    assert torch.equal(turned, whole.flip(0))
    assert not torch.equal(whole[1], whole[4])  # same label, other seed


def test_one_generator_gives_the_same_again_and_something_new_when_it_goes_on(make_model):
    model, (generator,) = make_model(), generators(3)
    first = model.generate([0, 0, 1], generator=generator)
    further = model.generate([0, 0, 1], generator=generator)
    again = model.generate([0, 0, 1], generator=generator.manual_seed(3))
    assert torch.equal(first, again) and not torch.equal(first, further)
    assert not torch.equal(first[0], first[1])


def test_without_generator_the_global_seed_decides(make_model):
    model = make_model()
    torch.manual_seed(0)
    first = model.generate([0, 1])
    assert not torch.equal(model.generate([0, 1]), first)
    torch.manual_seed(0)
    assert torch.equal(model.generate([0, 1]), first)


def test_greedy_decoding_leaves_the_generators_alone(make_model):
    model, (generator,) = make_model(), generators(3)
    state, global_state = generator.get_state(), torch.get_rng_state()
    codes = model.generate([0, 1], do_sample=False, generator=generator)
    assert torch.equal(generator.get_state(), state) and torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(codes, model.generate([0, 1], do_sample=False))


def test_an_integer_is_the_seed_of_a_generator_of_its_own(make_model):
    model = make_model()
    state = torch.get_rng_state()
    for seed in (3, np.int64(3), np.uint8(3), True + np.int32(2)):
        assert torch.equal(model.generate([0, 1], generator=seed), model.generate([0, 1], generator=generators(3)[0]))
    expected = model.generate([0, 1, 2], generator=generators(5, 2**64 - 1, 0))
    seeds = [5, generators(2**64 - 1)[0], np.int64(0)]
    assert torch.equal(model.generate([0, 1, 2], generator=seeds), expected)
    assert torch.equal(model.generate([0, 1, 2], generator=(5, 2**64 - 1, 0)), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "generator",
    [-1, 2**64, 1.0, True, "3", np.float32(3), np.array([3, 4]), [3], [3, None], [], {}, [[3], 4]],
)
def test_what_is_no_generator_and_no_seed_is_refused(generator, make_model):
    with pytest.raises(ValueError, match="`generator` must be"):
        make_model().generate([0, 1], generator=generator)
