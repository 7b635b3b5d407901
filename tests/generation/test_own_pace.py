"""Proves that images of a batch advance at their own pace, with the codes of one position a pass."""

from dataclasses import replace

import pytest
import torch
from definitions import regenerate, uniforms_of

from dnd_hf.generation import mixin
from dnd_hf.generation.decoders import plain_runner
from dnd_hf.generation.loop import SamplingLoop
from dnd_hf.ops.decoding_kernels import decoding_kernels


LARGER = dict(grid_size=(7, 10), num_attention_heads=4, num_key_value_heads=2, vocab_size=31)


@pytest.fixture(params=["packed", "kernels", "plain", "graphed"])
def every_decoder(request, monkeypatch):
    """All ways in which `generate` runs the layers, the compiled kernels included."""
    if request.param == "kernels" and decoding_kernels() is None:
        pytest.skip("no C++ compiler here")
    if request.param in ("plain", "graphed"):
        request.getfixturevalue(request.param)
    monkeypatch.setattr(mixin.ImageGenerationMixin, "cuda_graphs", request.param == "graphed")
    monkeypatch.setattr(mixin.ImageGenerationMixin, "cpu_kernels", request.param == "kernels")
    return request.param


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("mode", ["dnd", "vertical", "parallel"])
def test_the_codes_are_those_of_one_position_a_pass_in_every_depth_mode(mode, batch, make_model, every_decoder):
    model = make_model(depth_mode=mode, **{**LARGER, "grid_size": (5, 6)})
    labels, seeds = [index % 4 for index in range(batch)], list(range(10, 10 + batch))
    some = torch.rand(batch, 5, 6, 2, generator=torch.Generator().manual_seed(2)) < 0.2
    rows = torch.zeros_like(some)
    rows[:, 1] = rows[:, 3:, :4] = True  # rows that are given in all images, and parts of rows
    given = torch.randint(31, some.shape, generator=torch.Generator().manual_seed(3))
    for options in (
        dict(guidance_scale=1.0),
        dict(guidance_scale=2.5, guidance_schedule="linear", temperature=[0.8, 1.2], top_k=9),
        dict(codes=given, codes_mask=some | rows),
        dict(codes=given, codes_mask=rows, guidance_scale=1.0),
    ):
        expected = model.generate(labels, generator=seeds, positions_per_pass=1, **options)
        for width in (3, 7):
            codes = model.generate(labels, generator=seeds, positions_per_pass=width, **options)
            assert torch.equal(codes, expected)


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("text", [{}, dict(prompt_length=4, prompt_vocab_size=7)])
def test_the_rq_transformer_gives_the_codes_of_its_definition(
    text, batch, make_rq_model, make_rq_inputs, every_decoder
):
    model = make_rq_model(class_dropout_prob=0.1, grid_size=(3, 4), **text)
    conditions, given = make_rq_inputs(model, batch=batch)
    mask = torch.rand(given.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    seeds = list(range(batch))
    for scale, kept in ((1.0, {}), (2.5, {}), (2.5, dict(codes=given, codes_mask=mask))):
        codes = model.generate(conditions, guidance_scale=scale, generator=seeds, positions_per_pass=4, **kept)
        wanted = regenerate(model, conditions, scale, uniforms_of(model, *seeds), *kept.values())
        assert torch.equal(codes, wanted)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_backends_that_take_masks_go_at_an_own_pace(implementation, make_rq_model, make_rq_inputs, plain):
    model = make_rq_model(grid_size=(3, 4))
    conditions, _ = make_rq_inputs(model, batch=3)
    expected = model.generate(conditions, generator=[1, 2, 3])
    model.set_attn_implementation(implementation)
    assert torch.equal(model.generate(conditions, generator=[1, 2, 3], positions_per_pass=4), expected)


def shapes_of_passes(model, labels, **options) -> list[tuple[int, int]]:
    """`(rows, tokens)` of each pass of a call of `generate`."""
    shapes, decode = [], type(model).decode
    model.decode = lambda tokens, *rest: (shapes.append(tuple(tokens.shape[:2])), decode(model, tokens, *rest))[1]
    try:
        model.generate(labels, **options)
    finally:
        del model.decode
    return shapes


@pytest.mark.parametrize("width", [4, 9])
def test_a_batch_takes_the_passes_of_its_slowest_image_and_complete_ones_leave(width, make_model, decoder):
    model = make_model(**LARGER)
    labels, seeds = [0, 1, 2, 3, 0, 1, 2, 3], list(range(8))
    options = dict(positions_per_pass=width, guidance_scale=2.0)
    alone = [len(shapes_of_passes(model, label, generator=[seed], **options)) for label, seed in zip(labels, seeds)]
    assert len(set(alone)) > 2
    shapes = shapes_of_passes(model, labels, generator=seeds, **options)
    assert len(shapes) == max(alone)
    rows = [shape[0] for shape in shapes]
    assert rows[0] == 16 and rows == sorted(rows, reverse=True) and rows[-1] < 16
    for number, still in enumerate(rows):  # two sequences each; nobody leaves too early, nor much too late
        running = sum(passes > number for passes in alone)
        assert running <= still // 2 < running / 0.75 or running == still // 2


def test_captured_passes_are_all_of_one_shape(make_model, graphed):
    model = make_model(**LARGER)
    model.cuda_graphs = True
    shapes = shapes_of_passes(model, [0] * 3, generator=[1, 2, 3], positions_per_pass=4)
    assert set(shapes) == {(8, 4)}


def test_where_attention_takes_one_position_only_images_advance_together(make_model, plain, monkeypatch):
    model = make_model(**LARGER)
    expected = model.generate([0, 1, 2], generator=[1, 2, 3])
    monkeypatch.setattr(mixin, "plain_runner", lambda *a: replace(plain_runner(*a), together=True))
    monkeypatch.setattr(SamplingLoop, "step_apart", None)
    assert torch.equal(model.generate([0, 1, 2], generator=[1, 2, 3], positions_per_pass=4), expected)


def test_flash_attention_takes_one_position_only(make_model, monkeypatch):
    model = make_model()
    assert not plain_runner(model, 2, model.device).together
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    assert plain_runner(model, 2, model.device).together


def test_images_that_are_ahead_show_no_codes_before_the_others_have_them(make_model, decoder):
    model = make_model(**LARGER)
    seen = {1: [], 8: []}
    for width, codes in seen.items():
        steps = model.generate_steps([0, 1, 2, 3], generator=[1, 2, 3, 4], positions_per_pass=width)
        codes.extend((cell, one.clone()) for cell, one in steps)
    assert [cell for cell, _ in seen[8]] == list(range(70))
    assert all(torch.equal(one[1], other[1]) for one, other in zip(seen[1], seen[8], strict=True))
