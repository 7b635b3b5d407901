"""Proves several positions a pass: the codes are those of one position a pass, in fewer passes."""

import copy
import itertools
import random
import time

import pytest
import torch
import torch.nn.functional as F
from definitions import generators, regenerate, uniforms_of

from dnd_hf import DnDForImageGeneration, bundled_checkpoint
from dnd_hf.generation.loop import SamplingLoop
from dnd_hf.generation.own_pace import OwnPace
from dnd_hf.generation.windows import (
    AutomaticWindows,
    WindowRates,
    automatic_positions_per_pass,
    ends_of_passes,
)


LARGER = dict(grid_size=(7, 10), num_attention_heads=4, num_key_value_heads=2, code_depth=3)


def passes_of(model) -> list[int]:
    """A list that grows by the number of tokens of each pass."""
    passes = []
    decode = type(model).decode
    model.decode = lambda tokens, *rest: (passes.append(tokens.shape[1]), decode(model, tokens, *rest))[1]
    return passes


@pytest.mark.parametrize("width", [2, 3, 6, 100])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("mode", ["dnd", "vertical", "parallel"])
def test_several_positions_a_pass_give_the_codes_of_whole_prefixes(mode, sampled, width, make_model, any_decoder):
    model = make_model(depth_mode=mode, code_depth=3, num_key_value_heads=1)
    labels = torch.tensor([0, 3, 1])
    for scale in (1.0, 2.5):
        filters = dict(temperature=0.8, top_k=7, top_p=0.9)
        options = dict(generator=generators(5, 6, 7), **filters) if sampled else dict(do_sample=False)
        uniforms = dict(uniforms=uniforms_of(model, 5, 6, 7), **filters) if sampled else {}
        codes = model.generate(labels, guidance_scale=scale, positions_per_pass=width, **options)
        assert torch.equal(codes, regenerate(model, labels, scale, **uniforms))


@pytest.mark.parametrize("schedule", ["linear", "power-cosine"])
@pytest.mark.parametrize("width", [4, 33])
def test_forty_seeds_on_a_larger_grid_give_equal_codes(width, schedule, make_model, any_decoder):
    model = make_model(**LARGER)
    options = dict(guidance_scale=2.0, temperature=[0.7, 1.0, 1.3], guidance_schedule=schedule)
    labels, seeds = [index % 4 for index in range(40)], list(range(40))
    expected = model.generate(labels, generator=seeds, positions_per_pass=1, **options)
    assert torch.equal(model.generate(labels, generator=seeds, positions_per_pass=width, **options), expected)
    for label, seed in zip(labels[:5], seeds):
        codes = model.generate(label, generator=[seed], positions_per_pass=width, **options)
        assert torch.equal(codes[0], expected[seed])


@pytest.mark.parametrize("variant", [dict(), dict(prompt_length=4, prompt_vocab_size=7, class_dropout_prob=0.1)])
@pytest.mark.parametrize("width", [2, 4, 100])
def test_the_rq_transformer_takes_several_positions_a_pass_too(
    width, variant, make_rq_model, make_rq_inputs, any_decoder
):
    model = make_rq_model(**variant)
    conditions, given = make_rq_inputs(model)
    mask = torch.rand(given.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    scale = 2.5 if model.config.has_null_class else 1
    options = dict(guidance_scale=scale, generator=(5, 6), positions_per_pass=width)
    uniforms = uniforms_of(model, 5, 6)
    assert torch.equal(model.generate(conditions, **options), regenerate(model, conditions, scale, uniforms))
    codes = model.generate(conditions, codes=given, codes_mask=mask, **options)
    assert torch.equal(codes, regenerate(model, conditions, scale, uniforms, given, mask))


@pytest.mark.parametrize("width", [2, 4, 70])
def test_given_codes_stay_in_windows(width, make_model, make_inputs, any_decoder):
    model = make_model(**LARGER)
    labels, given = make_inputs(model)
    cells = torch.arange(70).view(7, 10, 1).expand(given.shape)
    single = torch.rand(given.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    for mask in (cells < 25, cells % 10 > 3, (cells % 10 > 6) | single):
        options = dict(generator=(5, 6), codes=given, codes_mask=mask)
        expected = model.generate(labels, positions_per_pass=1, **options)
        assert torch.equal(model.generate(labels, positions_per_pass=width, **options), expected)


def test_passes_end_before_given_cells_that_are_as_many_as_a_pass_has():
    whole = [False, True, True, False, True, False]
    assert ends_of_passes(whole, 3) == [6] * 6
    assert ends_of_passes(whole, 2)[0] == 1 and ends_of_passes(whole, 2)[3:] == [6, 6, 6]
    assert ends_of_passes(whole, 1)[0] == 1 and ends_of_passes(whole, 1)[3] == 4
    assert ends_of_passes([False] * 3, 1) == [3] * 3


@pytest.mark.parametrize("batch", [1, 3])
def test_many_given_cells_in_a_row_cost_no_passes_of_their_own(batch, make_model):
    model = make_model(**LARGER)
    given = model.generate([0] * batch, generator=list(range(batch)))
    mask = torch.ones(given.shape, dtype=torch.bool)
    mask[:, 2, :2] = mask[:, 4, 3:5] = mask[:, 6, :2] = False
    passes = passes_of(model)
    model.generate([0] * batch, generator=list(range(batch)), codes=given, codes_mask=mask, positions_per_pass=5)
    assert len(passes) <= 3 * 2  # at least one cell of two in each


def test_where_codes_do_not_depend_on_others_two_passes_do(make_model):
    """The first guesses are wrong everywhere and the second right everywhere."""
    model = make_model(depth_mode="parallel", **LARGER)
    model.embed_tokens.weight.data.zero_()
    passes = passes_of(model)
    model.generate([0], generator=3, positions_per_pass=70)
    assert len(passes) == 2
    passes.clear()
    model.generate([0], generator=3, positions_per_pass=1)
    assert passes == [1] * 70


def test_right_guesses_are_final_and_those_behind_a_wrong_one_are_not(make_model, monkeypatch):
    model = make_model()
    expected = model.generate([0, 1], generator=(1, 2)).flatten(1, 2)
    start = SamplingLoop.start

    def start_with_guesses(loop, *arguments):
        start(loop, *arguments)
        loop.codes_BLD.copy_(expected)
        loop.codes_BLD[0, 3, 1] += 1 if expected[0, 3, 1] < 10 else -1
        loop.codes_BLD[1, 4, 1] += 1 if expected[1, 4, 1] < 10 else -1

    monkeypatch.setattr(SamplingLoop, "start", start_with_guesses)
    places, step = [], OwnPace.step

    def step_and_note(pace, *arguments):
        final = step(pace, *arguments)
        places.append(list(pace.places))
        return final

    monkeypatch.setattr(OwnPace, "step", step_and_note)
    codes = model.generate([0, 1], generator=(1, 2), positions_per_pass=6)
    assert torch.equal(codes.flatten(1, 2), expected)
    # A cell with a wrong guess is right now, as the cells before it were. Behind it all is computed anew, and equal.
    assert places[0] == [4, 5]
    assert places[-1] == [6, 6]


def test_the_callback_is_called_once_a_position_in_order_and_sees_no_guesses(make_model, make_inputs, any_decoder):
    model = make_model()
    labels, given = make_inputs(model)
    mask = torch.rand(given.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    for options in (dict(), dict(codes=given, codes_mask=mask)):
        seen = {1: [], 4: []}
        for width, steps in seen.items():
            model.generate(
                labels,
                generator=(1, 2),
                positions_per_pass=width,
                callback=lambda cell, codes, steps=steps: steps.append((cell, codes.clone())),
                **options,
            )
        assert [cell for cell, _ in seen[4]] == list(range(6))
        assert all(torch.equal(one[1], other[1]) for one, other in zip(seen[1], seen[4], strict=True))
        stopped = model.generate(
            labels, generator=(1, 2), positions_per_pass=4, callback=lambda cell, _: cell == 2, **options
        )
        assert torch.equal(stopped, seen[1][2][1])


def test_logits_that_are_not_finite_are_an_error_in_windows_too(make_model, decoder):
    model = make_model()
    model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.generate([0, 1], positions_per_pass=4)


@pytest.fixture(scope="module")
def words() -> DnDForImageGeneration:
    return DnDForImageGeneration.from_pretrained(bundled_checkpoint("words"), subfolder="transformer").float().eval()


def test_the_bundled_model_gives_equal_codes_in_little_more_than_half_the_passes(words):
    """docs/benchmarks.md has the command for 200 seeds."""
    labels, seeds = list(range(16)), list(range(16))
    expected = words.generate(labels, generator=seeds)
    passes = passes_of(words)
    try:
        codes = [words.generate(label, generator=[seed], positions_per_pass=8)[0] for label, seed in zip(labels, seeds)]
    finally:
        del words.decode
    assert torch.equal(torch.stack(codes), expected)
    assert len(passes) / 16 < 64 / 1.7


def cumulative(model, label: int, codes: torch.Tensor) -> torch.Tensor:
    """Cumulative probabilities `(cells, depth, vocab + 1)` of a teacher-forced pass at temperature 0.85."""
    with torch.no_grad():
        logits = model(torch.tensor([label]), codes).logits[0].double() / 0.85
    return F.pad(logits.softmax(-1).cumsum(-1), (1, 0))


def test_rounding_decides_only_where_a_random_number_is_next_to_a_border(words, plain):
    """In bfloat16 codes differ. The first that does is next to a border: the random number lies outside of its interval
    of exact cumulative probabilities by no more than these are rounded in the image."""
    half = copy.deepcopy(words).bfloat16()
    exact, differing = copy.deepcopy(half).double(), 0
    for seed in range(4):
        options = dict(generator=[seed], guidance_scale=1, temperature=0.85)
        one, several = (half.generate(seed, positions_per_pass=width, **options) for width in (1, 8))
        differ = (one != several).flatten().nonzero()
        if not len(differ):
            continue
        differing += 1
        cell, k = divmod(int(differ[0]), 4)
        bounds = cumulative(exact, seed, one)
        rounding = 2 * (bounds - cumulative(half, seed, one)).abs().max()
        uniform = uniforms_of(half, seed)[0, cell, k]
        for code in (one.flatten()[differ[0]], several.flatten()[differ[0]]):
            low, high = bounds[cell, k, code], bounds[cell, k, code + 1]
            assert low - rounding <= uniform <= high + rounding
    assert differing


def test_auto_is_one_where_codes_could_change_or_nothing_is_gained():
    sizes = dict(rows=2, batch=1, length=64, dtype=torch.float32, packed=True)
    assert automatic_positions_per_pass(**sizes) == 8
    assert automatic_positions_per_pass(**{**sizes, "rows": 1}) == 16
    assert automatic_positions_per_pass(**{**sizes, "batch": 2, "rows": 4}) == 4
    for change in (dict(batch=3, rows=6), dict(length=63), dict(dtype=torch.bfloat16), dict(packed=False)):
        assert automatic_positions_per_pass(**{**sizes, **change}) == 1


def automatic_images(images: int, length: int, cost: float, cells_at) -> list[float]:
    """What each image takes, in passes of one cell, where a pass of eight takes `cost` of them and makes
    `cells_at(cell)` final."""
    rates, took = WindowRates(), []
    for _ in range(images):
        image, cell = AutomaticWindows(rates, length, 0.03 * length), 0
        took.append(0.0)
        while cell < length:
            several = image.allows(cell) and cell + 8 <= length
            took[-1] += cost if several else 1
            cells = cells_at(cell) if several else 1
            image.count(cost if several else 1.0, cells, several)
            cell += cells
        image.end()
    return took


@pytest.mark.parametrize("length, cost", [(64, 1.2), (64, 1.6), (256, 1.2), (256, 1.6), (256, 4.0)])
def test_no_image_loses_more_than_three_percent_by_auto_whatever_windows_bring(length, cost):
    chance = random.Random(0)
    for cells_at in (lambda cell: 1, lambda cell: 1 + (chance.random() < 0.1), lambda cell: 3 if cell < 9 else 1):
        took = automatic_images(40, length, cost, cells_at)
        assert max(took) <= 1.03 * length
        assert sum(took) <= 1.02 * 40 * length


def test_windows_that_take_more_than_an_image_may_lose_are_tried_by_few_images():
    """Before the first two passes of several cells nobody knows what they take; much later one may try again."""
    took = automatic_images(40, 64, 4.0, lambda cell: 1)
    assert took[0] == 64 + 2 * 3 and sorted(took[1:])[-2:] == [64, 64 + 3]


def test_a_first_pass_that_prepares_kernels_does_not_count():
    rates = WindowRates()
    image = AutomaticWindows(rates, 64, 2.0)
    for cell in range(8):
        assert not image.allows(cell)
        image.count(1.0, 1, several=False)
    for seconds in (30.0, 1.2):
        assert image.allows(8)
        image.count(seconds, 1, several=True)
    assert rates.cost == 1.2


@pytest.mark.parametrize("length", [64, 256])
def test_auto_finds_where_windows_pay_and_leaves_out_where_they_do_not(length):
    def cells_at(cell):
        return 1 if cell < length // 4 else 3

    took = automatic_images(40, length, 1.5, cells_at)
    best = length / 4 + length * 3 / 4 / 3 * 1.5
    assert sum(took[-20:]) / 20 <= 1.08 * best  # now and then it tries the first quarter again
    assert sum(automatic_images(40, length, 1.5, lambda cell: 3)[-20:]) / 20 <= 1.05 * length / 3 * 1.5 + 8


def test_auto_gives_the_codes_of_one_position_a_pass_in_fewer(words, monkeypatch):
    monkeypatch.setattr(time, "thread_time", itertools.count().__next__)  # all passes take as long
    passes = passes_of(words)
    try:
        codes = [words.generate(seed, generator=[seed]) for seed in range(6)]
        assert passes[:8] == [1] * 8 and 8 in passes
        passes.clear()
        words.generate(0, generator=[0])
        assert len(passes) < 50
    finally:
        del words.decode
    for seed, found in enumerate(codes):
        assert torch.equal(found, words.generate(seed, generator=[seed], positions_per_pass=1))


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "many", None])
def test_wrong_positions_per_pass_are_refused(wrong, make_model):
    with pytest.raises(ValueError, match="`positions_per_pass` must be"):
        make_model().generate([0], positions_per_pass=wrong)


def test_passes_of_several_positions_are_replayed_too(make_model, graphed):
    model = make_model(**LARGER)
    expected = model.generate([0, 1, 2], generator=3)
    model.cuda_graphs = True
    for _ in range(2):
        assert torch.equal(model.generate([0, 1, 2], generator=3, positions_per_pass=4), expected)
    (loop,) = [loop for free in model._kept_loops.free.values() for loop in free]
    assert set(loop.graphs) == {(64, 4), (70, 4)}  # no shorter ones at the end of the grid
    assert len(graphed) == 2
