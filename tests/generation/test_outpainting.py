"""outpaint: windows over a larger grid; each code by its definition, with one particle and with many."""

import itertools

import pytest
import torch
from definitions import assert_frequencies, filtered, generators, guided_logits

from dnd_hf.generation import mixin
from dnd_hf.ops.overlapping_windows import window_corners


@pytest.fixture(params=["dnd", "rq_transformer"])
def make(request, make_model, make_rq_model):
    """A function that makes a tiny model with codes of depth 2 and a null class."""
    if request.param == "rq_transformer":
        return lambda **overrides: make_rq_model(**{"code_depth": 2, "class_dropout_prob": 0.1, **overrides})
    return make_model


def labels_of(model, count: int) -> torch.Tensor:
    return torch.arange(count) % model.config.num_classes


def regenerate(model, labels, grid_size, corners, seeds, scale, given, mask, **filters) -> torch.Tensor:
    """outpaint by its definition: for each code a whole pass over its window, in which later cells are zeros.

    A code is made in the first window that has its cell; each window takes new random numbers for all its cells.
    """
    (rows, columns), depth = model.config.grid_size, model.config.code_depth
    draws = generators(*seeds)
    made = torch.where(mask, given, 0)
    known = mask.clone()
    for top, left in corners:
        shape = (1, rows * columns, depth)
        uniforms = torch.cat([torch.rand(shape, generator=one, dtype=torch.float64) for one in draws])
        for cell, k in itertools.product(range(rows * columns), range(depth)):
            row, column = divmod(cell, columns)
            window = made[:, top : top + rows, left : left + columns].clone()
            later = torch.arange(rows * columns * depth).view(1, rows, columns, depth) >= cell * depth + k
            logits = guided_logits(model, labels, window.masked_fill(later, 0), scale)[:, cell, k]
            reached = torch.as_tensor(filtered(logits, **filters)).cumsum(-1)
            drawn = (reached <= uniforms[:, cell, k, None]).sum(-1)
            at = (slice(None), top + row, left + column, k)
            made[at] = torch.where(known[at], made[at], drawn)
        known[:, top : top + rows, left : left + columns] = True
    return made


@pytest.mark.parametrize(
    ("size", "overlap", "corners"),
    [
        ((2, 3), None, [(0, 0)]),
        ((4, 3), 1, [(0, 0), (1, 0), (2, 0)]),
        ((2, 7), (1, 1), [(0, 0), (0, 2), (0, 4)]),
        ((3, 6), (1, 2), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]),
        ((2, 6), (9, 1), [(0, 0), (0, 2), (0, 3)]),  # no window above another: the rows need no overlap
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_each_code_is_drawn_given_those_before_it_in_its_window(given, size, overlap, corners, make):
    model = make(grid_size=(2, 3))
    labels, depth = labels_of(model, 2), model.config.code_depth
    codes = torch.randint(11, (2, *size, depth), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(codes, dtype=torch.bool)
    if given:  # the first columns of the first rows, and a single code
        mask[:, :2, :2] = mask[1, -1, -1, 1] = True
    filters = dict(temperature=0.8, top_k=6)
    expected, mask_before = regenerate(model, labels, size, corners, (5, 6), 1.5, codes, mask, **filters), mask.clone()
    found = model.outpaint(
        labels,
        size,
        overlap,
        codes=codes.masked_fill(~mask, -1) if given else None,
        codes_mask=mask if given else None,
        generator=generators(5, 6),
        guidance_scale=1.5,
        **filters,
    )
    assert torch.equal(found, expected)
    assert torch.equal(found[mask], codes[mask]) and torch.equal(mask, mask_before)


def test_the_windows_of_the_default_share_half_of_the_grid_and_the_last_ends_with_it():
    assert window_corners((16, 40), (16, 16), None) == [(0, 0), (0, 8), (0, 16), (0, 24)]
    assert window_corners((30, 16), (16, 16), None) == [(0, 0), (8, 0), (14, 0)]


def test_codes_below_have_the_distribution_of_the_model_given_the_row_above(make):
    """The grid of two codes a row: those of the first window, then one row more, against their enumeration."""
    model, total = make(vocab_size=3, grid_size=(2, 1)), 4000
    sampled = model.outpaint([1] * total, (3, 1), generator=0, guidance_scale=1.0)
    grids = torch.tensor(list(itertools.product(range(3), repeat=6))).view(-1, 3, 1, 2)
    first, second = (model.score([1] * len(grids), grids[:, top : top + 2]).log_probs for top in (0, 1))
    log_probs = first.double().sum((1, 2, 3)) + second[:, 1].double().sum((1, 2))
    expected = {tuple(grid.flatten().tolist()): p.exp().item() for grid, p in zip(grids, log_probs)}
    assert abs(sum(expected.values()) - 1) < 1e-5
    assert_frequencies(counts_of(sampled), expected, total)
    torch.testing.assert_close(model.outpaint_log_probs([1] * len(grids), grids).double().sum((1, 2, 3)), log_probs)


def test_many_particles_make_the_codes_to_the_right_fit_all_that_are_to_the_left(make):
    """A column is given, and the one right of it has the exact posterior, by enumeration; one particle has not."""
    model, total = make(vocab_size=3, grid_size=(2, 2)), 1000
    known = torch.tensor([[[0, 2], [1, 2]], [[2, 1], [0, 0]]])
    codes = torch.cat([known, torch.zeros(2, 1, 2, dtype=torch.long)], dim=1).expand(total, 2, 3, 2)
    mask = torch.tensor([True, True, False]).view(1, 1, 3, 1).expand(codes.shape)
    options = dict(overlap=1, codes=codes, codes_mask=mask, guidance_scale=1.0, generator=0)
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 1, 2)
    windows = torch.cat([known[:, 1:].expand(len(grids), -1, -1, -1), grids], dim=2)
    posterior = model.score([1] * len(grids), windows).total.double().softmax(0)
    expected = {tuple(grid.flatten().tolist()): p.item() for grid, p in zip(grids, posterior)}
    for num_particles in (60, 1):
        sampled = model.outpaint([1] * total, (2, 3), num_particles=num_particles, **options)
        assert torch.equal(sampled[:, :, :2], codes[:, :, :2])
        if num_particles > 1:
            assert_frequencies(counts_of(sampled[:, :, 2:]), expected, total)
        else:
            with pytest.raises(AssertionError):
                assert_frequencies(counts_of(sampled[:, :, 2:]), expected, total)


def counts_of(codes) -> dict[tuple, int]:
    grids, counts = codes.flatten(1).unique(dim=0, return_counts=True)
    return {tuple(grid.tolist()): count.item() for grid, count in zip(grids, counts)}


def test_the_first_window_is_the_image_of_generate(make):
    model = make()
    labels = labels_of(model, 2)
    for generator in (7, [7, 8]):
        expected = model.generate(labels, generator=generator)
        assert torch.equal(model.outpaint(labels, (2, 3), generator=generator), expected)
        assert torch.equal(model.outpaint(labels, (5, 4), generator=generator)[:, :2, :3], expected)


def test_an_image_with_its_own_generator_does_not_depend_on_the_batch(make):
    model = make()
    labels = labels_of(model, 3)
    whole = model.outpaint(labels, (4, 5), generator=[1, 2, 3])
    for i in range(3):
        assert torch.equal(model.outpaint(labels[i], (4, 5), generator=[i + 1])[0], whole[i])
    assert torch.equal(model.outpaint(labels, (4, 5), generator=[1, 2, 3]), whole)


def test_prompts_make_larger_grids_too(make_rq_model):
    model = make_rq_model(prompt_length=4, prompt_vocab_size=7)
    prompts = torch.randint(7, (2, 4), generator=torch.Generator().manual_seed(0))
    made = model.outpaint(prompts, (4, 3), generator=[1, 2])
    assert torch.equal(made[:, :2], model.generate(prompts, generator=[1, 2])) and made.shape == (2, 4, 3, 3)


def test_a_window_below_reads_the_rows_that_it_takes_over_in_one_pass(make_model):
    model, seen = make_model(grid_size=(4, 3)), []
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.outpaint([1], (8, 3), guidance_scale=1.0, positions_per_pass=1)
    first, below = [1] * 12, [7, *[1] * 5]  # the label and two rows of three, then the cells of two rows
    assert seen == [*first, *below, *below]


def test_the_callback_sees_each_cell_once_and_may_end_the_sampling(make, any_decoder):
    model, seen = make(), []
    labels = labels_of(model, 2)
    options = dict(grid_size=(3, 5), overlap=1, generator=3)
    done = model.outpaint(labels, **options, callback=lambda step, codes: seen.append((step, codes.clone())))
    assert [step for step, _ in seen] == list(range(15))
    order = [*range(3), *range(5, 8), 3, 4, 8, 9, *range(10, 15)]  # the cells in the order of the windows
    for step, codes in seen:
        before = torch.zeros(15, dtype=torch.bool)
        before[order[: step + 1]] = True
        assert torch.equal(codes, done * before.view(1, 3, 5, 1))
    stopped = model.outpaint(labels, **options, callback=lambda step, _: step == 7)
    assert torch.equal(stopped, seen[7][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(grid_size=(1, 3)), r"`grid_size` must be at least the model's \(2, 3\), got \(1, 3\)"),
        (dict(grid_size=(4, 2)), r"`grid_size` must be at least the model's \(2, 3\), got \(4, 2\)"),
        (dict(grid_size=(4, 3.5)), "`grid_size` must be a whole number"),
        (dict(grid_size=(4, 3, 2)), "`grid_size` must be one whole number or"),
        (dict(overlap=0), "`overlap` must be at least 1"),
        (dict(overlap=(2, 1)), r"`overlap` must be at least 1 and less than the model's grid \(2, 3\), got 2"),
        (dict(overlap=-1), "`overlap` must be at least 1"),
        (dict(num_particles=0), "`num_particles` must be at least 1"),
        (dict(codes=torch.zeros(1, 2, 3, 2).long()), "`codes` and `codes_mask` must be given together"),
        (
            dict(codes=torch.zeros(1, 2, 3, 2).long(), codes_mask=torch.ones(1, 2, 3, 2).bool()),
            r"`codes` must have shape \(1, 4, 3, 2\)",
        ),
        (dict(generator=[1, 2]), "`generator` must be one, or a list of one per image"),
        (dict(class_labels=[9]), "`class_labels` must lie in"),
        (dict(temperature=0), "`temperature` must be"),
        (dict(top_k=[1, 2, 3]), "`top_k` must be one value or one per depth"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_any_work(options, message, make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(mixin.SamplingLoop, "step", None)
    with pytest.raises(ValueError, match=message):
        model.outpaint(**{"class_labels": [1], "grid_size": (4, 3), **options})
