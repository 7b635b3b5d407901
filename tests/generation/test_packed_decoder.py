"""Proves packed decoding on CPUs: grids, precision, and which models run packed."""

import pytest
import torch
from definitions import generators, regenerate, uniforms_of

from dnd_hf.generation.decoders import plain_runner
from dnd_hf.generation.packed_decoder import can_run_packed, packed_runner
from dnd_hf.ops.cpu_precision import has_instructions


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

    def read_by_heads(runner) -> torch.Tensor:
        seen = []

        def choose(k, hidden_RTC):
            seen.append(runner.heads[k](hidden_RTC[:, -1]))
            return torch.zeros(3, 1, dtype=torch.long)

        with runner.context():
            for position, token_RTC in enumerate(tokens.to(model.dtype)):
                model.decode(token_RTC, choose, runner.decoders, position)
        return torch.stack(seen).double()

    exact = read_by_heads(plain_runner(model, 3, model.device))
    torch.testing.assert_close(read_by_heads(packed_runner(model, 3)), exact, rtol=1e-4, atol=1e-4)
    model.bfloat16()
    plain, packed = read_by_heads(plain_runner(model, 3, model.device)), read_by_heads(packed_runner(model, 3))
    errors = [(decoded - exact).square().mean().sqrt().item() for decoded in (plain, packed)]
    assert 0 < errors[1] < 1.2 * errors[0]


def test_models_that_somebody_has_changed_are_not_packed(make_model):
    class Adapter(torch.nn.Linear):
        """Stands for a projection with LoRA, or a quantized one."""

    class OwnNorm(torch.nn.RMSNorm):
        pass

    assert can_run_packed(make_model())
    assert can_run_packed(make_model().bfloat16()) == has_instructions(torch.device("cpu"), torch.bfloat16)
    assert not can_run_packed(make_model().half())
    model = make_model()
    handle = model.layers[1].register_forward_hook(lambda *_: None)
    assert not can_run_packed(model)
    handle.remove()
    assert can_run_packed(model)
    model.layers[2].mlp.forward = model.layers[2].mlp.forward  # as the offloading hooks of accelerate do
    assert not can_run_packed(model)
    model = make_model()
    model.layers[1].input_layernorm = OwnNorm(16)
    assert not can_run_packed(model)
    model = make_model()
    model.layers[1].self_attn.k_norm = torch.nn.RMSNorm(8)
    assert not can_run_packed(model)
    for changed in ("self_attn.q_proj", "mlp.down_proj"):
        model = make_model()
        old = model.layers[0].get_submodule(changed)
        model.layers[0].set_submodule(changed, Adapter(old.in_features, old.out_features, bias=False))
        assert not can_run_packed(model)
        model.generate([0])


class PlainMLP(torch.nn.Module):
    """The MLP of a block without a gate."""

    def __init__(self, mlp):
        super().__init__()
        self.up_proj, self.act_fn, self.down_proj = mlp.up_proj, torch.nn.GELU(), mlp.down_proj

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_blocks_with_layer_norms_and_without_a_gate_are_packed_too(scale, make_model, request):
    model = make_model(**LARGER)
    for layer in model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16)
        torch.nn.init.normal_(layer.input_layernorm.bias)
        layer.mlp = PlainMLP(layer.mlp)
    assert can_run_packed(model)
    codes = model.generate([0, 3], guidance_scale=scale, do_sample=False)
    request.getfixturevalue("plain")
    assert torch.equal(codes, model.generate([0, 3], guidance_scale=scale, do_sample=False))


class OwnTensor(torch.Tensor):
    """Stands for a weight that holds its numbers in another way: quantized, sharded."""


@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj", "heads.0", "embed_tokens"])
def test_weights_of_another_tensor_class_are_not_packed(name, make_model):
    model = make_model()
    expected = model.generate([0, 3], do_sample=False)
    part = model.get_submodule(name)
    part.weight = torch.nn.Parameter(part.weight.detach().as_subclass(OwnTensor))
    assert type(part.weight) is not torch.nn.Parameter and not can_run_packed(model)
    assert torch.equal(model.generate([0, 3], do_sample=False), expected)
