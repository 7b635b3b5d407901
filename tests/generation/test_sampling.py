"""Proves generate(): cached decoding against whole prefixes, the distributions it samples, generators, the cache."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch._dynamo.testing import CompileCounter
from transformers import GenerationConfig

from dnd_hf.generation import sampling as generation_dnd
from dnd_hf.generation.decoders import Decoder, PackedDecoder
from dnd_hf.generation.sampling import GraphSampler, Sampler, _logits_filters, draw


MODES = ("dnd", "vertical", "parallel")


@pytest.fixture
def plain(monkeypatch):
    """Lets `generate` run the layers as they are, on this CPU too."""
    monkeypatch.setattr(PackedDecoder, "can_run", lambda model: False)


@pytest.fixture(params=["packed", "plain"])
def decoder(request):
    """Both ways in which `generate` runs the layers."""
    if request.param == "plain":
        request.getfixturevalue("plain")


def generators(*seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniforms_of(model, *seeds) -> np.ndarray:
    """The uniform numbers `(images, cells, depth)` that generators of these seeds give the images."""
    shape = (1, model.config.sequence_length, model.config.code_depth)
    return torch.cat([torch.rand(shape, generator=one, dtype=torch.float64) for one in generators(*seeds)]).numpy()


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """The probabilities `(..., vocab)` that temperature, then top-k, then top-p leave, by definition in float64."""
    logits = np.asarray(logits, dtype=np.float64) / temperature
    if logits.ndim > 1:
        return np.stack([filtered(row, 1.0, top_k, top_p) for row in logits])
    weights = np.exp(logits - logits.max())
    ranked = np.argsort(-weights, kind="stable")
    if top_k:
        weights[ranked[top_k:]] = 0
    weights /= weights.sum()
    reached = np.cumsum(weights[ranked])
    kept = np.searchsorted(reached, top_p) + 1  # the fewest codes that reach top_p
    weights[ranked[kept:]] = 0
    return weights / weights.sum()


@torch.no_grad()
def guided_logits(model, class_labels, codes, scale) -> torch.Tensor:
    """Logits `(images, cells, depth, vocab)` of a whole teacher-forced pass, guided by the formula."""
    logits = model(class_labels, codes).logits.double()
    if scale == 1:
        return logits
    null = model(torch.full_like(class_labels, model.config.num_classes), codes).logits.double()
    return null + (logits - null) * scale


def regenerate(model, class_labels, scale, uniforms=None, **filters) -> torch.Tensor:
    """generate() by its definition: the whole sequence anew for each single code, zeros where none is known yet."""
    config = model.config
    codes = torch.zeros(len(class_labels), *config.grid_size, config.code_depth, dtype=torch.long)
    flat = codes.view(len(class_labels), -1, config.code_depth)
    for cell in range(flat.shape[1]):
        for k in range(config.code_depth):
            at_cell = scale[cell] if isinstance(scale, list) else scale
            logits = guided_logits(model, class_labels, codes, at_cell)[:, cell, k]
            if uniforms is None:
                flat[:, cell, k] = logits.argmax(-1)
            else:
                reached = filtered(logits, **filters).cumsum(-1)
                flat[:, cell, k] = torch.tensor((reached <= uniforms[:, cell, k, None]).sum(-1))
    return codes


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


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_guidance_is_null_plus_scaled_difference(scale, make_model):
    model, class_labels = make_model(), torch.arange(4)
    guided = model.generate(class_labels, guidance_scale=scale, do_sample=False)
    assert torch.equal(guided, regenerate(model, class_labels, scale))
    if scale == 0:  # the class has no say: all images are one
        assert (guided == guided[:1]).all()
    else:
        assert not torch.equal(guided, model.generate(class_labels, guidance_scale=1.0, do_sample=False))


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"guidance_schedule": "linear"}, [1 + 6 * t / 6 for t in range(6)]),
        (
            {"guidance_schedule": "power-cosine", "guidance_power": 1},
            [4 - 3 * math.cos(t * math.pi / 6) for t in range(6)],
        ),
        ({"guidance_schedule": "power-cosine"}, [4 - 3 * math.cos(math.pi * (t / 6) ** 2.75) for t in range(6)]),
        ({"guidance_schedule": "constant", "guidance_power": 3}, [7] * 6),
    ],
)
def test_guidance_grows_as_its_schedule_says(settings, scales, make_model):
    model, class_labels = make_model(), torch.arange(4)
    guided = model.generate(class_labels, guidance_scale=7.0, do_sample=False, **settings)
    assert torch.equal(guided, regenerate(model, class_labels, scales))
    model.generation_config.update(guidance_scale=7.0)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert torch.equal(model.generate(class_labels, do_sample=False), guided)


def test_draw_takes_the_first_code_whose_cumulative_probability_exceeds_the_uniform():
    logits = torch.tensor([0.25, 0.5, 0.0, 0.25]).log().repeat(7, 1)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [0, 0, 1, 1, 3, 3, 1]
    only_last = torch.tensor([[-torch.inf, -torch.inf, 3.0]])
    assert draw(only_last, torch.zeros(1, dtype=torch.float64)).item() == 2
    first_alone = torch.tensor([[3.0, -torch.inf, -torch.inf]])
    assert draw(first_alone, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 0


def assert_frequencies(counts: dict, probabilities: dict, total: int) -> None:
    """Chi-square of counts against probabilities; cells of fewer than five expected counts are one cell."""
    impossible = [outcome for outcome in counts if probabilities.get(outcome, 0) == 0]
    assert not impossible
    likely = [outcome for outcome, p in probabilities.items() if p * total >= 5]
    expected = [probabilities[outcome] * total for outcome in likely]
    observed = [counts.get(outcome, 0) for outcome in likely]
    if total - sum(expected) > 1e-3:
        expected.append(total - sum(expected))
        observed.append(total - sum(observed))
    assert len(expected) > 1
    assert chisquare(observed, np.array(expected) * sum(observed) / sum(expected)).pvalue > 1e-4


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


def test_filters_are_applied_in_the_order_temperature_top_k_top_p(make_model):
    model, class_labels = make_model(code_depth=3), torch.tensor([2, 0, 1, 3])
    filters = dict(temperature=1.8, top_k=5, top_p=0.75)
    codes = model.generate(class_labels, guidance_scale=1.5, generator=generators(1, 2, 3, 4), **filters)
    assert torch.equal(codes, regenerate(model, class_labels, 1.5, uniforms_of(model, 1, 2, 3, 4), **filters))


@pytest.mark.parametrize("filters", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)], ids=str)
def test_the_narrowest_filters_are_greedy(filters, make_model):
    model = make_model()
    greedy = model.generate([0, 1, 2], do_sample=False)
    assert torch.equal(model.generate([0, 1, 2], generator=generators(0)[0], **filters), greedy)


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


def test_arguments_left_out_come_from_the_generation_config(make_model):
    model = make_model()
    settings = dict(guidance_scale=1.3, temperature=0.8, top_k=6, top_p=0.9)
    explicit = model.generate([0, 1, 2], generator=generators(4, 5, 6), **settings)
    unset = model.generate([0, 1, 2], generator=generators(4, 5, 6))
    assert not torch.equal(explicit, unset)
    assert torch.equal(
        model.generate([0, 1, 2], generator=generators(4, 5, 6), generation_config=GenerationConfig(**settings)),
        explicit,
    )
    model.generation_config.update(**settings)
    assert torch.equal(model.generate([0, 1, 2], generator=generators(4, 5, 6)), explicit)
    back = dict(guidance_scale=2.0, temperature=1.0, top_k=0, top_p=1.0)
    assert torch.equal(model.generate([0, 1, 2], generator=generators(4, 5, 6), **back), unset)
    model.generation_config.do_sample = False
    assert torch.equal(model.generate([0, 1, 2]), model.generate([0, 1, 2], do_sample=False, guidance_scale=1.3))


@pytest.mark.parametrize("class_dropout_prob", [0.1, 0.0])
def test_an_empty_generation_config_means_plain_sampling_and_guidance_where_it_can_be(class_dropout_prob, make_model):
    model = make_model(class_dropout_prob=class_dropout_prob)
    plain = dict(temperature=1.0, top_k=0, top_p=1.0, do_sample=True)
    scale = 2.0 if class_dropout_prob else 1.0
    expected = model.generate([0, 1, 2], guidance_scale=scale, generator=generators(4, 5, 6), **plain)
    empty = model.generate([0, 1, 2], generator=generators(4, 5, 6), generation_config=GenerationConfig())
    assert torch.equal(empty, expected)
    assert torch.equal(model.generate([0, 1, 2], generator=generators(4, 5, 6)), expected)


def test_labels_may_be_a_number_a_list_or_a_tensor(make_model):
    model = make_model()
    expected = model.generate(torch.tensor([2]), do_sample=False)
    for class_labels in (2, [2], torch.tensor(2), torch.tensor([2], dtype=torch.int32), np.array([2])):
        assert torch.equal(model.generate(class_labels, do_sample=False), expected)


def test_the_cache_is_allocated_once_and_smaller_batches_use_a_part(make_model, plain):
    model = make_model()
    model.generate([0, 1, 2], guidance_scale=2.0)
    storage = model._cache_storage
    layers, heads, cells, size = 3, 2, 6, 8
    assert storage.shape == (layers, 2, 6, heads, cells, size)  # three images and their null halves
    for class_labels, scale in (([0, 1, 2], 2.0), ([3], 2.0), ([0, 1, 2, 3], 1.0)):
        model.generate(class_labels, guidance_scale=scale)
        assert model._cache_storage.data_ptr() == storage.data_ptr()
    model.generate([0, 1, 2, 3], guidance_scale=2.0)
    assert model._cache_storage.shape[2] == 8


def test_what_an_earlier_call_left_in_the_cache_does_not_matter(make_model, plain):
    model = make_model()
    expected = model.generate([0, 1], do_sample=False)
    model._cache_storage.fill_(torch.nan)
    assert torch.equal(model.generate([0, 1], do_sample=False), expected)
    model.generate([3, 2, 1, 0, 0])
    assert torch.equal(model.generate([0, 1], do_sample=False), expected)


def test_the_cache_is_not_saved_and_follows_the_dtype(make_model, plain):
    model = make_model()
    model.generate([0])
    assert not any("cache" in name for name in model.state_dict())
    codes = model.bfloat16().generate([0, 1], do_sample=False)
    assert model._cache_storage.dtype == torch.bfloat16
    assert codes.min() >= 0 and codes.max() < 11


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 3), (2.0, 6), (0.0, 6)])
def test_one_pass_a_cell_and_half_the_rows_without_guidance(scale, rows, make_model):
    model, seen = make_model(), []
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    model.generate([0, 1, 2], guidance_scale=scale)
    assert seen == [(rows, 1, 16)] * 6


def test_layers_above_the_last_head_are_not_run(make_model):
    model, seen = make_model(prediction_layers=[0, 1]), []
    model.layers[2].register_forward_pre_hook(lambda *_: seen.append(1))
    model.generate([0])
    assert not seen and model._cache_storage.shape[0] == 2


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


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_backends_generate_the_same(implementation, make_model, plain):
    model = make_model(num_key_value_heads=1)
    expected = regenerate(model, torch.tensor([0, 1]), 2.0)
    model.set_attn_implementation(implementation)
    assert torch.equal(model.generate([0, 1], guidance_scale=2.0, do_sample=False), expected)


LARGER = dict(grid_size=(7, 10), num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize("tied", [False, True])
def test_grids_larger_than_a_step_of_the_packed_cache(tied, make_model, decoder):
    model = make_model(tie_prediction_heads=tied, **LARGER)
    codes = model.generate([0, 3], guidance_scale=2.0, generator=generators(5, 6))
    assert torch.equal(codes, regenerate(model, torch.tensor([0, 3]), 2.0, uniforms_of(model, 5, 6)))


@torch.no_grad()
def test_packed_layers_are_as_exact_in_bfloat16_as_the_layers_they_stand_for(make_model):
    model = make_model(hidden_size=64, intermediate_size=96, num_hidden_layers=4, **LARGER)
    tokens = torch.randn(70, 3, 1, 64, generator=torch.Generator().manual_seed(0))

    def read_by_heads(decoder) -> torch.Tensor:
        seen = []
        for position, token_BLC in enumerate(tokens.to(model.dtype)):
            model.run_layers(
                token_BLC,
                lambda k, hidden_BLC: seen.append(decoder.head(k)(hidden_BLC)) or torch.zeros(3, 1, dtype=torch.long),
                decoder.layers,
                **decoder.at(position),
            )
        return torch.stack(seen).double()

    exact = read_by_heads(Decoder(model, model._allocate_cache(3, model.device)))
    torch.testing.assert_close(read_by_heads(PackedDecoder(model, 3)), exact, rtol=1e-4, atol=1e-4)
    model.bfloat16()
    plain = read_by_heads(Decoder(model, model._allocate_cache(3, model.device)))
    packed = read_by_heads(PackedDecoder(model, 3))
    errors = [(decoded - exact).square().mean().sqrt().item() for decoded in (plain, packed)]
    assert 0 < errors[1] < 1.2 * errors[0]


def test_models_that_somebody_has_changed_are_not_packed(make_model):
    class Adapter(torch.nn.Linear):
        """Stands for a projection with LoRA, or a quantized one."""

    assert PackedDecoder.can_run(make_model()) and PackedDecoder.can_run(make_model().bfloat16())
    assert not PackedDecoder.can_run(make_model().half())
    model = make_model()
    handle = model.layers[1].register_forward_hook(lambda *_: None)
    assert not PackedDecoder.can_run(model)
    handle.remove()
    assert PackedDecoder.can_run(model)
    model.layers[2].mlp.forward = model.layers[2].mlp.forward  # as the offloading hooks of accelerate do
    assert not PackedDecoder.can_run(model)
    model = make_model()
    model.layers[1].input_layernorm = torch.nn.LayerNorm(16)
    assert not PackedDecoder.can_run(model)
    for changed in ("self_attn.q_proj", "mlp.down_proj"):
        model = make_model()
        old = model.layers[0].get_submodule(changed)
        model.layers[0].set_submodule(changed, Adapter(old.in_features, old.out_features, bias=False))
        assert not PackedDecoder.can_run(model)
        model.generate([0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("sampled", [False, True])
def test_steps_that_are_replayed_sample_what_others_do(sampled, implementation, make_model, monkeypatch):
    """Everything of `cuda_graphs` but the graphs: in their place the captured function runs again."""
    captured = []

    def capture(step, others):
        captured.append(step)
        return SimpleNamespace(replay=step)

    monkeypatch.setattr(generation_dnd, "capture", capture)
    model = make_model(**LARGER)
    model.set_attn_implementation(implementation)
    filters = _logits_filters(0.9, 7, 0.95, 2) if sampled else None
    sampler = GraphSampler(model, 4, True, filters, torch.device("cpu"))
    memory = sampler.decoder.storage.data_ptr()
    for class_labels, seeds in (([0, 3, 1], (5, 6, 7)), ([2, 2], (8, 9))):
        options = dict(generator=generators(*seeds), temperature=0.9, top_k=7, top_p=0.95) if sampled else {}
        expected = model.generate(class_labels, guidance_scale=2.0, do_sample=sampled, **options)
        noise = torch.tensor(uniforms_of(model, *seeds)) if sampled else None
        with torch.no_grad():
            sampler.start(torch.tensor(class_labels), noise, [2.0] * 70)
            for position in range(70):
                sampler.step(position)
        assert torch.equal(sampler.codes_BLD[: len(class_labels)].unflatten(1, (7, 10)), expected)
        assert len(captured) == 2 and sampler.decoder.storage.data_ptr() == memory  # 64 positions, and the other 6


def test_a_static_step_asks_the_device_for_nothing(make_model):
    """torch.compile refuses whole graphs of functions that read a number back, as `.item()` does."""
    model = make_model(num_key_value_heads=1)
    sampler = GraphSampler(model, 2, True, _logits_filters(0.9, 7, 0.95, 2), torch.device("cpu"))
    with torch.no_grad():
        sampler.start(torch.tensor([0, 1]), torch.rand(2, 6, 2, dtype=torch.float64), [2.0] * 6)
        step = torch.compile(Sampler.step, backend="eager", fullgraph=True)
        for _ in range(6):  # the position is the sampler's own
            step(sampler, 0)
    expected = sampler.codes_BLD.clone()
    with torch.no_grad():
        sampler.start(torch.tensor([0, 1]), sampler.noise_BLD.clone(), [2.0] * 6)
        for position in range(6):
            Sampler.step(sampler, position)
    assert torch.equal(sampler.codes_BLD, expected)


def test_layers_compile_once_for_all_of_them(make_model, plain, monkeypatch):
    """Twice in fact: PyTorch takes the first position for a constant, and for a variable when it sees the second."""
    monkeypatch.setattr(generation_dnd, "capture", lambda step, others: SimpleNamespace(replay=step))
    model = make_model(**LARGER, num_hidden_layers=12, prediction_layers=[4, 11])
    expected = model.generate([0, 1], do_sample=False)
    torch._dynamo.reset()
    counter = CompileCounter()
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert torch.equal(model.generate([0, 1], do_sample=False), expected)
    assert counter.frame_count == 2

    torch._dynamo.reset()
    sampler = GraphSampler(model, 2, True, None, torch.device("cpu"))
    with torch.no_grad():
        sampler.start(torch.tensor([0, 1]), None, [2.0] * 70)
        for position in range(70):
            sampler.step(position)
    assert torch.equal(sampler.codes_BLD.view_as(expected), expected)
    assert counter.frame_count == 4

    torch._dynamo.reset()
    model(torch.tensor([0, 1]), expected, labels=expected).loss.backward()
    assert counter.frame_count == 5


def test_cuda_graphs_are_refused_where_there_are_none(make_model):
    model = make_model()
    model.cuda_graphs = True
    with pytest.raises(ValueError, match="`cuda_graphs` must be False except on CUDA devices"):
        model.generate([0])
