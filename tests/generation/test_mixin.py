"""Proves generate(): cached decoding against whole prefixes, labels, the callback, calls that overlap."""

import threading
from concurrent.futures import ThreadPoolExecutor

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


SEEDS = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12)]


def call(model, seeds, **options) -> torch.Tensor:
    return model.generate([0, 3], generator=generators(*seeds), temperature=0.9, **options)


class Meeting:
    """A callback with which the calls of two threads take turns: each waits for the other at each cell."""

    def __init__(self):
        self.barrier = threading.Barrier(2)

    def __call__(self, cell, codes):
        self.barrier.wait(timeout=30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_two_threads_on_one_model_get_the_codes_of_one(dtype, make_model, any_decoder):
    model = make_model(code_depth=3).to(dtype)
    expected = [call(model, seeds) for seeds in SEEDS]
    meeting = Meeting()
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda seeds: call(model, seeds, callback=meeting), SEEDS))
    assert all(map(torch.equal, codes, expected))


def test_threads_on_a_model_with_hooks_get_the_codes_of_one(make_model):
    model = make_model()
    model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    expected = [call(model, seeds) for seeds in SEEDS]
    meeting = Meeting()
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda seeds: call(model, seeds, callback=meeting), SEEDS))
    assert all(map(torch.equal, codes, expected))


def test_a_call_inside_a_callback_disturbs_neither(make_model, any_decoder):
    model = make_model(code_depth=3)
    expected, inner = call(model, (1, 2)), []
    codes = call(model, (1, 2), callback=lambda cell, _: inner.append(call(model, (3, 4))))
    assert torch.equal(codes, expected)
    assert len(inner) == 6 and all(torch.equal(one, call(model, (3, 4))) for one in inner)


def test_threads_leave_a_model_in_training_mode_and_frozen_parts_of_it_not(make_model, any_decoder):
    model = make_model(residual_dropout=0.5, mlp_dropout=0.5)
    expected = [call(model, seeds) for seeds in SEEDS]
    model.train().layers[0].eval()
    modes = [module.training for module in model.modules()]
    meeting = Meeting()
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda seeds: call(model, seeds, callback=meeting), SEEDS))
    assert all(map(torch.equal, codes, expected))
    assert [module.training for module in model.modules()] == modes


def test_a_call_that_outlives_another_on_a_model_in_training_mode_stays_in_evaluation_mode(make_model, plain):
    model = make_model(residual_dropout=0.5)
    expected, inner = call(model, (1, 2)), []
    model.train()

    def callback(cell, _):
        if cell == 0:
            inner.append(call(model, (3, 4)))
            assert not any(module.training for module in model.modules())

    assert torch.equal(call(model, (1, 2), callback=callback), expected)
    assert all(module.training for module in model.modules())
    assert torch.equal(inner[0], call(model, (3, 4)))


def test_calls_inside_and_outside_of_inference_mode_follow_each_other(make_model, any_decoder):
    model = make_model()
    expected = call(make_model(), (1, 2))
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(call(model, (1, 2)), expected)
        codes = call(model, (1, 2))
        assert torch.equal(codes, expected) and not codes.is_inference()
        model(torch.tensor([0, 3]), codes, labels=codes).loss.backward()  # they can be trained on


def broken(model):
    model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    return model


def overflowing(model):
    model.layers[1].mlp.up_proj.weight.data *= 6e4
    return model.half()


@pytest.mark.parametrize("change", [broken, overflowing])
@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"top_k": 3, "top_p": 0.9}], ids=str)
def test_logits_that_are_not_finite_are_an_error_that_says_so(options, change, make_model, any_decoder):
    model = change(make_model())
    seen = []
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the logits are not finite .* weights are broken or overflow"):
            model.generate([0, 1], **options, callback=lambda cell, codes: seen.append(int(codes.max())))
    assert max(seen) < 11


@pytest.mark.parametrize("options", [{"temperature": 1e-40}, {"guidance_scale": 3e38}], ids=str)
def test_settings_that_no_logits_survive_are_named(options, make_model, any_decoder):
    model = make_model()
    expected = model.generate([0, 1], do_sample=False)
    with pytest.raises(ValueError, match=f"not finite .*`{next(iter(options))}`"):
        model.generate([0, 1], **options)
    assert torch.equal(model.generate([0, 1], do_sample=False), expected)  # nothing of it stays


def test_a_model_that_is_mended_in_place_generates_again(make_model, any_decoder):
    model = make_model()
    expected = call(model, (1, 2))
    weight = model.layers[1].mlp.up_proj.weight.data
    kept = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        call(model, (1, 2))
    weight.copy_(kept)
    assert torch.equal(call(model, (1, 2)), expected)


def test_a_callback_that_returns_true_ends_the_sampling(make_model, any_decoder):
    model = make_model()
    expected = call(model, (1, 2)).flatten(1, 2)
    for stop in (0, 3, 5):
        codes = call(model, (1, 2), callback=lambda cell, codes, last=stop: cell == last).flatten(1, 2)
        assert torch.equal(codes[:, : stop + 1], expected[:, : stop + 1])
        assert (codes[:, stop + 1 :] == 0).all()
    assert torch.equal(call(model, (1, 2)).flatten(1, 2), expected)


def test_a_call_that_ends_with_an_error_leaves_nothing_behind(make_model, any_decoder):
    model = make_model()
    expected = call(model, (1, 2))

    def fail(cell, codes):
        if cell == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(model, (3, 4), callback=fail)
    assert torch.equal(call(model, (1, 2)), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_float32_models_generate_inside_autocast(implementation, make_model, any_decoder):
    model = make_model(code_depth=3)
    model.set_attn_implementation(implementation)
    expected = call(model, (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        codes = call(model, (1, 2))
        assert torch.equal(codes, call(model, (1, 2)))
    if any_decoder == "plain":  # layers follow autocast as in forward; the others compute as the weights are
        assert codes.min() >= 0 and codes.max() < 11
    else:
        assert torch.equal(codes, expected)
    assert torch.equal(call(model, (1, 2)), expected)


def test_steps_are_the_cells_and_end_in_the_codes_of_generate(make_model, any_decoder):
    model = make_model()
    expected = model.generate([0, 1], generator=3)
    seen = [(cell, codes.clone()) for cell, codes in model.generate_steps([0, 1], generator=3)]
    assert [cell for cell, _ in seen] == list(range(6)) and torch.equal(seen[-1][1], expected)
    assert torch.equal(seen[2][1].flatten(1, 2)[:, :3], expected.flatten(1, 2)[:, :3])


def test_steps_that_are_closed_compute_nothing_more_and_leave_nothing_behind(make_model, any_decoder):
    model, drawn = make_model().train(), []
    steps = model.generate_steps([0], generator=torch.Generator().manual_seed(0))
    assert model.training and torch.is_grad_enabled()
    next(steps)
    assert not model.training and torch.is_grad_enabled()
    model.layers[0].register_forward_hook(lambda *_: drawn.append(1))
    steps.close()
    assert model.training and not drawn
    with pytest.raises(StopIteration):
        next(steps)


def test_wrong_arguments_of_steps_are_errors_before_the_first(make_model):
    with pytest.raises(ValueError, match="`temperature` must be"):
        make_model().generate_steps([0], temperature=0)
