"""Proves that the models run under `torch.compile`, `torch.export` and `torch.autocast`."""

import pytest
import torch


def make_images(batch: int = 2, seed: int = 3) -> torch.Tensor:
    return torch.rand(batch, 3, 4, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_the_forward_pass_of_a_transformer_compiles_as_one_graph(make_model, make_inputs):
    model = make_model()
    labels, codes = make_inputs(model)
    expected = model(labels, codes, labels=codes)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    output = compiled(labels, codes, labels=codes)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
    output = compiled(labels, codes, labels=codes, output_logits=False)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)


@torch.no_grad()
def test_all_of_a_tokenizer_compiles_as_one_graph(make_vae):
    vae, images = make_vae(block_out_channels=(8,)), make_images()
    encoded, sample = vae.encode(images), vae(images).sample
    options = dict(backend="aot_eager", fullgraph=True)
    codes = torch.compile(vae.encode, **options)(images).codes
    assert torch.equal(codes, encoded.codes)
    output = torch.compile(vae, **options)(images)
    assert torch.equal(output.codes, encoded.codes)
    torch.testing.assert_close(output.sample, sample, rtol=0, atol=1e-6)
    decoded = torch.compile(vae.decode_codes, **options)(codes).sample
    torch.testing.assert_close(decoded, vae.decode_codes(codes).sample, rtol=0, atol=1e-6)


def test_a_compiled_tokenizer_trains_as_one_that_is_not(make_vae):
    images, results = make_images(), []
    for compiled in (False, True):
        vae = make_vae(block_out_channels=(8,)).train()
        model = torch.compile(vae, backend="aot_eager") if compiled else vae
        for _ in range(2):
            output = model(images)
            (output.sample.square().mean() + output.commitment_loss).backward()
        results.append((vae.quantizer.codebooks, [parameter.grad for parameter in vae.parameters()]))
    (codebooks, gradients), (others, other_gradients) = results
    torch.testing.assert_close(others, codebooks, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_an_exported_tokenizer_gives_the_codes_of_any_batch(make_vae):
    vae = make_vae()
    batch = torch.export.Dim("batch", max=63)  # diffusers' upsampling treats 64 and more in another way
    exported = torch.export.export(vae, (make_images(),), dynamic_shapes=({0: batch},))
    images = make_images(batch=5, seed=9)
    output = exported.module()(images)
    assert torch.equal(output.codes, vae.encode(images).codes)
    torch.testing.assert_close(output.sample, vae(images).sample, rtol=0, atol=1e-6)


def test_autocast_runs_a_float32_tokenizer_in_bfloat16(make_vae):
    vae, images = make_vae().train(), make_images()
    exact = vae.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        encoded, output = vae.encode(images), vae(images)
        decoded, previewed = vae.decode(exact.latents), vae.decode_codes(exact.codes)
    assert encoded.latents.dtype == output.sample.dtype == decoded.sample.dtype == torch.bfloat16
    assert output.commitment_loss.dtype == vae.quantizer.codebooks.dtype == torch.float32
    sample = make_vae().decode_codes(exact.codes).sample
    for rounded, expected in ((encoded.latents, exact.latents), (previewed.sample, sample)):
        assert 0 < (rounded - expected).norm() < 16 * 2**-8 * expected.norm()  # a rounding of bfloat16 is up to 2^-8
    (output.sample.float().square().mean() + output.commitment_loss).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in vae.parameters())


@torch.no_grad()
def test_an_exported_transformer_gives_the_logits_of_any_batch(make_model, make_inputs):
    model = make_model()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, make_inputs(model), dynamic_shapes=({0: batch}, {0: batch}))
    labels, codes = make_inputs(model, batch=5)
    torch.testing.assert_close(exported.module()(labels, codes).logits, model(labels, codes).logits)


@pytest.mark.parametrize("output_logits", [True, False])
def test_autocast_runs_a_float32_transformer_in_bfloat16(output_logits, make_model, make_inputs):
    model = make_model().train()
    labels, codes = make_inputs(model)
    exact = model.eval()(labels, codes, labels=codes).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(labels, codes, labels=codes, output_logits=output_logits)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert 0 < (output.loss - exact).abs() < 16 * 2**-8 * exact
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert not output_logits or output.logits.dtype == torch.bfloat16
