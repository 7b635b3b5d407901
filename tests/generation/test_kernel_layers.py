"""Proves decoding with compiled kernels: the codes of the layers as they are, in every way of sampling."""

import pytest
import torch
from torch.profiler import profile

from dnd_hf.generation import packed_decoder
from dnd_hf.generation.decoders import plain_runner
from dnd_hf.generation.kernel_layers import KernelDecoder
from dnd_hf.generation.packed_decoder import packed_runner
from dnd_hf.ops.decoding_kernels import decoding_kernels


LARGER = dict(grid_size=(7, 10), num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True)


@pytest.fixture(autouse=True)
def _compiler():
    if decoding_kernels() is None:
        pytest.skip("no C++ compiler here")


@pytest.fixture(params=["dnd", "dnd with few keys", "rq", "rq with a prompt"])
def model(request, make_model, make_rq_model):
    if request.param.startswith("dnd"):
        return make_model(vocab_size=101, **(LARGER if "few" in request.param else {}))
    text = dict(prompt_length=3, prompt_vocab_size=7) if "prompt" in request.param else {}
    return make_rq_model(vocab_size=101, class_dropout_prob=0.1, grid_size=(5, 6), hidden_act="quick_gelu", **text)


@pytest.fixture
def conditions(model, make_inputs, make_rq_inputs):
    return (make_inputs if hasattr(model, "embed_tokens") else make_rq_inputs)(model, batch=3)[0]


@pytest.mark.parametrize("options", [dict(), dict(guidance_scale=2.0), dict(positions_per_pass=4)])
def test_codes_are_those_of_200_seeds_without_kernels(options, model, conditions):
    batches = [dict(generator=list(range(start, start + 3)), **options) for start in range(0, 201, 3)]
    expected = [
        model.generate(conditions, **batch) for batch in batches[: 67 if model.config.sequence_length < 10 else 8]
    ]
    model.cpu_kernels = True
    assert isinstance(packed_runner(model, 3).decoders[0], KernelDecoder)
    for codes, batch in zip(expected, batches):
        assert torch.equal(model.generate(conditions, **batch), codes)


def test_a_block_with_a_gate_of_silu_is_two_calls(make_model):
    model = make_model()
    model.cpu_kernels = True
    with profile() as seen:
        model.generate([0])
    calls = {event.key: event.count for event in seen.key_averages()}
    passes = model.config.sequence_length * (model.config.prediction_layers[-1] + 1)
    assert calls["dnd_hf_decoding::attention_branch"] == calls["dnd_hf_decoding::add_gated_mlp"] == passes
    assert "aten::silu" not in calls


def test_codes_of_a_packed_model_are_the_same_with_kernels(model, conditions):
    expected = model.generate(conditions, generator=[1, 2, 3])
    model.cpu_kernels = True
    model.pack_for_cpu()
    assert torch.equal(model.generate(conditions, generator=[1, 2, 3]), expected)
    scores = model.score(conditions, expected).log_probs
    model.unpack_weights()
    torch.testing.assert_close(scores, model.score(conditions, expected).log_probs, rtol=1e-4, atol=1e-4)


def test_resampled_particles_are_the_same_with_kernels(make_model, make_inputs):
    model = make_model()
    labels, codes = make_inputs(model)
    mask = torch.zeros(codes.shape, dtype=torch.bool)
    mask[:, 1] = True
    options = dict(num_particles=4, generator=[1, 2])
    expected = model.inpaint(labels, codes, mask, **options)
    model.cpu_kernels = True
    assert torch.equal(model.inpaint(labels, codes, mask, **options), expected)


@torch.no_grad()
def test_kernels_are_as_exact_in_bfloat16_as_the_layers_they_stand_for(make_model):
    model = make_model(hidden_size=64, intermediate_size=96, num_hidden_layers=4, **LARGER)
    tokens = torch.randn(70, 3, 1, 64, generator=torch.Generator().manual_seed(0))

    def outputs(runner) -> torch.Tensor:
        seen = []
        with runner.context():
            for position, hidden_RTC in enumerate(tokens.to(model.dtype)):
                for layer in runner.decoders[0].at(position):
                    hidden_RTC = layer(hidden_RTC)
                seen.append(hidden_RTC)
        return torch.stack(seen).double()

    exact = outputs(plain_runner(model, 3, model.device))
    model.bfloat16()
    plain = outputs(plain_runner(model, 3, model.device))
    model.cpu_kernels = True
    errors = [(decoded - exact).square().mean().sqrt().item() for decoded in (plain, outputs(packed_runner(model, 3)))]
    assert 0 < errors[1] < 1.1 * errors[0]


def test_without_kernels_a_model_that_asked_for_them_runs_packed_as_before(make_model, monkeypatch):
    model = make_model()
    expected = model.generate([0, 3], do_sample=False)
    monkeypatch.setattr(packed_decoder, "decoding_kernels", lambda: None)
    model.cpu_kernels = True
    assert torch.equal(model.generate([0, 3], do_sample=False), expected)
