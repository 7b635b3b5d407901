"""Proves plain decoding: what a pass runs, every attention backend, compiled layers."""

import pytest
import torch
from definitions import regenerate
from torch._dynamo.testing import CompileCounter

from dnd_hf.generation.decoders import StaticDecoder, plain_runner, static_runner
from dnd_hf.generation.packed_decoder import packed_runner
from dnd_hf.ops.decoding_kernels import decoding_kernels


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
    assert not seen


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_backends_generate_the_same(implementation, make_model, plain):
    model = make_model(num_key_value_heads=1)
    expected = regenerate(model, torch.tensor([0, 1]), 2.0)
    model.set_attn_implementation(implementation)
    assert torch.equal(model.generate([0, 1], guidance_scale=2.0, do_sample=False), expected)


LARGER = dict(grid_size=(7, 10), num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True)


def test_layers_compile_once_for_all_of_them(make_model, plain, graphed):
    """Twice in fact: PyTorch takes the first position for a constant, and for a variable when it sees the second."""
    model = make_model(**LARGER, num_hidden_layers=12, prediction_layers=[4, 11])
    expected = model.generate([0, 1], do_sample=False)
    torch._dynamo.reset()
    counter = CompileCounter()
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert torch.equal(model.generate([0, 1], do_sample=False), expected)
    assert counter.frame_count == 2

    torch._dynamo.reset()
    model.cuda_graphs = True
    assert torch.equal(model.generate([0, 1], do_sample=False), expected)
    assert counter.frame_count == 4

    torch._dynamo.reset()
    model(torch.tensor([0, 1]), expected, labels=expected).loss.backward()
    assert counter.frame_count == 5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_several_tokens_in_one_pass_are_those_of_one_pass_each(implementation, make_model):
    model = make_model(**LARGER)
    model.set_attn_implementation(implementation)
    tokens = torch.randn(3, 70, 16, generator=torch.Generator().manual_seed(0))

    def run(make_runner, *lengths) -> torch.Tensor:
        (decoder,), outputs = make_runner(model, 3, model.device).decoders, []
        for part in tokens.split(lengths, dim=1):
            position = sum(output.shape[1] for output in outputs)
            if isinstance(decoder, StaticDecoder):
                decoder.memory[..., position:, :] = 0
                decoder.position.fill_(position)
            for layer in decoder.at(position, part.shape[1]):
                part = layer(part)
            outputs.append(part)
        return torch.cat(outputs, dim=1)

    expected = run(plain_runner, *[1] * 70)
    for make_runner in (plain_runner, static_runner, lambda model, rows, _: packed_runner(model, rows)):
        for lengths in ([40, 1, 29], [70], [1, 66, 3]):
            torch.testing.assert_close(run(make_runner, *lengths), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["eager", "sdpa", "static", "packed", "kernels"])
@torch.no_grad()
def test_tokens_at_positions_of_their_own_are_those_of_each_sequence_by_itself(way, make_model):
    """A pass of three sequences at different positions; then of two of them, when the others have left."""
    model = make_model(**LARGER)
    model.set_attn_implementation("sdpa" if way in ("static", "packed", "kernels") else way)
    if way == "kernels" and decoding_kernels() is None:
        pytest.skip("no C++ compiler here")
    model.cpu_kernels = way == "kernels"
    tokens = torch.randn(3, 70, 16, generator=torch.Generator().manual_seed(0))

    def run(decoder, part, position) -> torch.Tensor:
        if isinstance(decoder, StaticDecoder):
            decoder.position.copy_(torch.tensor(position).view(-1, 1).expand_as(decoder.position))
        for layer in decoder.at(position, part.shape[1]):
            part = layer(part)
        return part

    expected = run(plain_runner(model, 3, model.device).decoders[0], tokens, 0)
    if way in ("packed", "kernels"):
        runner = packed_runner(model, 3)
    else:
        runner = (static_runner if way == "static" else plain_runner)(model, 3, model.device)
    with runner.context():
        decoder = runner.decoders[0]
        run(decoder, tokens[:, :62], 0)
        for count, positions, rows in ((3, [62, 5, 40], [0, 1, 2]), (1, [65, 8, 41], [0, 1, 2]), (4, [9, 30], [1, 2])):
            if len(rows) < 3 and way == "static":
                break  # its shapes do not change
            if len(rows) < 3:
                decoder.reorder(torch.tensor(rows))
            part = torch.stack([tokens[row, at : at + count] for row, at in zip(rows, positions)])
            wanted = torch.stack([expected[row, at : at + count] for row, at in zip(rows, positions)])
            torch.testing.assert_close(run(decoder, part, positions), wanted, rtol=1e-4, atol=1e-4)
