"""Proves the RQVAE: shapes, codes to images and back, partial depths, slices and tiles, saving, precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dnd_hf import RQVAE
from dnd_hf.models import autoencoder_rqvae
from dnd_hf.models.autoencoder_rqvae import _tiled


EPS = torch.finfo(torch.float32).eps


def random_images(height=4, width=6, batch=2, seed=3) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_codes(vae, batch=2, height=2, width=3, seed=4) -> torch.Tensor:
    shape = (batch, height, width, vae.config.code_depth)
    return torch.randint(vae.config.num_vq_embeddings, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("patch", [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_rectangular_images_of_every_stride_become_codes_and_images_again(levels, patch, make_vae):
    stride = 2 ** (levels - 1)
    vae = make_vae(block_out_channels=(8,) * levels, code_depth=3, code_patch_size=patch, vq_embed_dim=5)
    assert vae.stride == stride and vae.code_stride == (stride * patch[0], stride * patch[1])
    images = random_images(2 * stride * patch[0], 3 * stride * patch[1])
    with torch.no_grad():
        encoded, output = vae.encode(images), vae(images)
    assert encoded.latents.shape == (2, 5, 2 * patch[0], 3 * patch[1])
    assert encoded.codes.shape == output.codes.shape == (2, 2, 3, 3)
    assert encoded.codes.dtype == torch.int64
    assert encoded.codes.min() >= 0 and encoded.codes.max() < 11
    assert encoded.commitment_loss.shape == output.commitment_loss.shape == ()
    assert output.sample.shape == vae.decode_codes(encoded.codes).sample.shape == images.shape


def test_default_is_the_tokenizer_of_the_paper():
    with torch.device("meta"):
        vae = RQVAE()
    assert vae.stride == 16 and vae.grid_size == (16, 16)
    assert vae.quantizer.codebooks.shape == (1, 16384, 256)  # shared
    assert vae.quantizer.depth == 2
    assert [block.resnets[-1].conv2.out_channels for block in vae.encoder.down_blocks] == [128, 128, 256, 256, 512]
    assert all(len(block.resnets) == 2 for block in vae.encoder.down_blocks)
    assert vae.encoder.conv_norm_out.num_groups == 32 and vae.encoder.conv_norm_out.eps == 1e-6


def test_attention_stands_at_the_lowest_resolution_and_in_the_middle_by_default(make_vae):
    vae = make_vae(block_out_channels=(8, 8, 8))
    encoder, decoder = vae.encoder, vae.decoder
    assert [hasattr(block, "attentions") for block in encoder.down_blocks] == [False, False, True]
    assert [hasattr(block, "attentions") for block in decoder.up_blocks] == [True, False, False]
    assert encoder.mid_block.attentions[0] is not None and decoder.mid_block.attentions[0] is not None
    plain = make_vae(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    assert not any(hasattr(block, "attentions") for block in (*plain.encoder.down_blocks, *plain.decoder.up_blocks))


@torch.no_grad()
def test_encode_decode_and_forward_tell_the_same_story(make_vae):
    vae, images = make_vae(), random_images()
    encoded, output = vae.encode(images), vae(images)
    assert torch.equal(output.codes, encoded.codes)
    assert output.commitment_loss.item() == pytest.approx(encoded.commitment_loss.item(), rel=8 * EPS)
    tolerance = dict(rtol=0, atol=1e-5)  # forward quantizes as v + (q - v)
    sample = vae.decode_codes(encoded.codes).sample
    torch.testing.assert_close(output.sample, sample, **tolerance)
    assert torch.equal(vae.decode(encoded.latents).sample, sample)
    other = vae.decode(encoded.latents, force_not_quantize=True).sample
    assert (other - sample).abs().max() > 1e-3


@torch.no_grad()
def test_unquantized_training_passes_latents_through_and_leaves_the_codebooks_alone(make_vae):
    vae, images = make_vae().train(), random_images()
    before = {name: buffer.clone() for name, buffer in vae.named_buffers()}
    output = vae(images, quantize=False)
    torch.testing.assert_close(
        output.sample, vae.decode(vae.encode(images).latents, force_not_quantize=True).sample, rtol=0, atol=16 * EPS
    )
    assert output.codes is None and output.commitment_loss == 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in vae.named_buffers())


def test_initial_convolutions_keep_the_variance_of_their_input():
    vae = RQVAE(block_out_channels=(64, 64), num_vq_embeddings=8)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_in = module.weight[0].numel()
            # the sample variance of n normal values has a standard deviation of sqrt(2 / n)
            tolerance = 5 * (2 / module.weight.numel()) ** 0.5
            assert module.weight.var().item() * fan_in == pytest.approx(1, rel=tolerance), name
            assert not module.bias.any()


def test_latents_are_the_convolutions_of_diffusers_in_order(make_vae):
    vae, images = make_vae(), random_images()
    latents = vae.quant_conv(vae.encoder(images))
    assert torch.equal(vae.encode(images).latents, latents)
    assert torch.equal(vae.decode(latents, force_not_quantize=True).sample, vae.decoder(vae.post_quant_conv(latents)))


@torch.no_grad()
def test_commitment_loss_is_the_mean_over_depths_of_the_squared_error(make_vae):
    vae, images = make_vae(code_depth=3), random_images()
    encoded = vae.encode(images)
    latents, entries = encoded.latents.double(), vae.quantizer.codebooks[0].double()
    losses = []
    for depth in (1, 2, 3):
        partial = entries[encoded.codes[..., :depth]].sum(-2).permute(0, 3, 1, 2)
        losses.append((latents - partial).square().mean())
    expected = torch.stack(losses).mean().item()
    assert encoded.commitment_loss.item() == pytest.approx(expected, rel=32 * EPS)


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_decoding_to_a_depth_decodes_the_sum_of_the_first_code_vectors(shared, make_vae):
    vae = make_vae(code_depth=4, shared_codebook=shared)
    codes = random_codes(vae)
    books = [vae.quantizer.codebooks[0 if shared else k] for k in range(4)]
    samples = []
    for depth in (1, 2, 3, 4):
        latents = sum(books[k][codes[..., k]] for k in range(depth)).permute(0, 3, 1, 2)
        expected = vae.decode(latents, force_not_quantize=True).sample
        samples.append(vae.decode_codes(codes, depth=depth).sample)
        torch.testing.assert_close(samples[-1], expected, rtol=0, atol=1e-6)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(samples, samples[1:]))
    assert torch.equal(vae.decode_codes(codes).sample, samples[-1])


@torch.no_grad()
def test_a_code_patch_is_a_block_of_latent_cells_row_by_row(make_vae):
    vae, images = make_vae(code_patch_size=(2, 3), sample_size=(8, 12)), random_images(8, 12)
    encoded = vae.encode(images)
    for row, column in ((0, 0), (1, 1), (0, 1)):
        block = encoded.latents[:, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        cell = torch.cat([block[:, :, i, j] for i in range(2) for j in range(3)], dim=1)
        assert torch.equal(vae.quantizer.encode(cell), encoded.codes[:, row, column])
    vectors = vae.quantizer.decode(encoded.codes)  # (batch, 2, 2, 24)
    latents = torch.empty_like(encoded.latents)
    for y in range(4):
        for x in range(6):
            part = 3 * (y % 2) + x % 3
            latents[:, :, y, x] = vectors[:, y // 2, x // 3, 4 * part : 4 * part + 4]
    expected = vae.decode(latents, force_not_quantize=True).sample
    torch.testing.assert_close(vae.decode_codes(encoded.codes).sample, expected, rtol=0, atol=1e-5)
    wrong = vae.decode(latents.roll(1, 3), force_not_quantize=True).sample
    assert (wrong - expected).abs().max() > 1e-3


def test_codes_of_every_integer_dtype_are_taken(make_vae):
    vae = make_vae()
    codes = random_codes(vae)
    expected = vae.decode_codes(codes).sample
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(vae.decode_codes(codes.to(dtype)).sample, expected)


def test_tuples_are_returned_on_request(make_vae):
    vae, images = make_vae(), random_images()
    latents, codes, _ = vae.encode(images, return_dict=False)
    assert torch.equal(vae.decode(latents, return_dict=False)[0], vae.decode_codes(codes, return_dict=False)[0])
    assert len(vae(images, return_dict=False)) == 3


def test_only_a_forward_pass_in_training_mode_updates_the_codebook(make_vae):
    vae, images = make_vae(), random_images()
    before = vae.quantizer.codebooks.clone()
    vae(images)
    vae.train().encode(images)
    vae.decode(vae.encode(images).latents)
    assert torch.equal(vae.quantizer.codebooks, before)
    vae(images)
    assert not torch.equal(vae.quantizer.codebooks, before)


def test_gradients_reach_every_parameter(make_vae):
    vae = make_vae().train()
    output = vae(random_images())
    (output.sample.square().mean() + output.commitment_loss).backward()
    silent = [name for name, parameter in vae.named_parameters() if not parameter.grad.abs().sum() > 0]
    # a bias before the softmax of the attention keys cancels exactly
    assert all(name.endswith("to_k.bias") for name in silent), silent


def test_gradient_checkpointing_gives_the_same_gradients_and_codebook(make_vae):
    results = []
    for checkpointing in (False, True):
        vae = make_vae().train()
        if checkpointing:
            vae.enable_gradient_checkpointing()
            assert vae.encoder.gradient_checkpointing and vae.decoder.gradient_checkpointing
        output = vae(random_images())
        (output.sample.square().mean() + output.commitment_loss).backward()
        results.append((vae, {name: parameter.grad for name, parameter in vae.named_parameters()}))
    (plain, gradients), (checkpointed, others) = results
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-7)
    assert torch.equal(plain.quantizer.codebooks, checkpointed.quantizer.codebooks)
    assert checkpointed.quantizer.num_updates == 1


@torch.no_grad()
@pytest.mark.parametrize("patch", [(1, 1), (2, 1)])
def test_a_local_encoder_encodes_each_position_as_if_it_were_an_image(patch, make_vae):
    vae = make_vae(local_encoder=True, code_patch_size=patch, vq_embed_dim=5).double()
    (rows, columns), images = vae.code_stride, random_images(8, 12).double()
    encoded = vae.encode(images)
    for row in range(8 // rows):
        for column in range(12 // columns):
            part = images[:, :, row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
            alone = vae.encode(part)
            assert torch.equal(alone.codes[:, 0, 0], encoded.codes[:, row, column])
            latents = encoded.latents[:, :, row * patch[0] : (row + 1) * patch[0], column * patch[1] :][..., : patch[1]]
            torch.testing.assert_close(alone.latents, latents, rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("local", [True, False])
def test_only_a_local_encoder_sees_nothing_of_its_neighbours(local, make_vae):
    vae, images = make_vae(local_encoder=local), random_images(8, 12)
    changed = images.clone()
    changed[:, :, 2:4, 2:4] += 1
    difference = (vae.encode(changed).latents - vae.encode(images).latents).abs().amax((0, 1)) > 1e-5
    assert difference[1, 1] and (difference.sum() == 1) == local


@torch.no_grad()
def test_slicing_gives_what_no_slicing_gives(make_vae):
    vae, images = make_vae(), random_images(batch=3)
    encoded, codes = vae.encode(images), random_codes(vae, batch=3)
    sample = vae.decode_codes(codes).sample
    rows = []
    vae.encoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    vae.enable_slicing()
    sliced = vae.encode(images)
    assert rows == [1, 1, 1]
    assert torch.equal(sliced.codes, encoded.codes)
    torch.testing.assert_close(sliced.latents, encoded.latents, rtol=0, atol=1e-6)
    torch.testing.assert_close(vae.decode_codes(codes).sample, sample, rtol=0, atol=1e-6)
    vae.disable_slicing()
    assert torch.equal(vae.encode(images).latents, encoded.latents) and rows[-1] == 3


@torch.no_grad()
def test_an_image_of_one_tile_is_the_same_with_tiling(make_vae):
    vae, images = make_vae(), random_images()
    expected = vae(images).sample
    vae.enable_tiling()
    assert torch.equal(vae(images).sample, expected)


@torch.no_grad()
def test_tiles_equal_the_whole_away_from_seams_where_the_receptive_field_ends(make_vae):
    # Stride 1, no attention, no normalisation: the decoder sees 10 pixels around, half the overlap is 8.
    vae = make_vae(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        mid_block_add_attention=False,
        sample_size=64,
    )
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    images = random_images(64, 112, batch=1)
    latents = vae.encode(images).latents
    sample = vae.decode(latents, force_not_quantize=True).sample
    vae.enable_tiling()
    widths = []
    vae.decoder.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[-1]))
    tiled_latents = vae.encode(images).latents
    tiled = vae.decode(latents, force_not_quantize=True).sample
    assert widths == [64, 64]  # columns 0-63 and 48-111
    for whole, parts in ((latents, tiled_latents), (sample, tiled)):
        for columns in (slice(0, 48), slice(64, 112)):
            torch.testing.assert_close(parts[..., columns], whole[..., columns], rtol=1e-5, atol=1e-6)
        seam = (parts - whole)[..., 48:64].abs().max()
        assert 1e-6 < seam < whole.abs().max()  # tiles end there


@pytest.mark.parametrize("size", [(8, 12), (13 * 2, 9 * 2), (40, 8), (8, 16), (10, 64)])
def test_tiles_of_a_pointwise_function_are_its_whole(size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    for fn, scale in (
        (lambda part: F.interpolate(part, scale_factor=2, mode="nearest"), 2),
        (lambda part: F.avg_pool2d(part, 2), 0.5),
        (lambda part: part.sin(), 1),
    ):
        shapes = []

        def watched(part, fn=fn, shapes=shapes):
            shapes.append(part.shape[2:])
            return fn(part)

        torch.testing.assert_close(_tiled(watched, x, (8, 12), scale), fn(x), rtol=8 * EPS, atol=8 * EPS)
        assert all(height <= 8 and width <= 12 for height, width in shapes)


def test_seams_are_blended_without_a_jump():
    tile, width = 64, 208
    values = iter(range(100))
    blended = _tiled(lambda part: torch.full_like(part, next(values)), torch.zeros(1, 1, tile, width), (tile, tile), 1)
    profile = blended[0, 0, 10]
    assert profile[0] == 0 and profile[-1] == 3
    jumps = profile.diff()
    assert (jumps > -8 * EPS).all()
    assert jumps.max() <= 1 / (tile // 4 + 1) + 8 * EPS  # one step over the overlap of a quarter tile


@torch.no_grad()
def test_a_tokenizer_is_the_same_after_saving(make_vae, tmp_path):
    vae, images = make_vae(code_depth=3, shared_codebook=False, code_patch_size=(1, 3)), random_images()
    vae.train()(images)  # so that the state is not the initial one
    vae.eval().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = RQVAE.from_pretrained(tmp_path)
    assert not loaded.training
    for name, tensor in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded.encode(images).codes, vae.encode(images).codes)
    torch.testing.assert_close(loaded(images).sample, vae(images).sample, rtol=0, atol=1e-6)
    assert loaded.config.code_patch_size == [1, 3] and loaded.code_stride == (2, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_codebooks_stay_float32_when_the_rest_is_loaded_in_half_precision(dtype, make_vae, tmp_path):
    vae = make_vae()
    vae.save_pretrained(tmp_path)
    loaded = RQVAE.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dtype == loaded.encoder.conv_in.weight.dtype == dtype
    for name, tensor in vae.quantizer.state_dict().items():
        assert torch.equal(loaded.quantizer.state_dict()[name], tensor), name
        assert loaded.quantizer.state_dict()[name].dtype == tensor.dtype
    cast = make_vae().to(dtype)
    assert cast.quantizer.codebooks.dtype == torch.float32

    images = random_images().to(dtype)
    encoded = cast.encode(images)
    assert encoded.latents.dtype == cast(images).sample.dtype == cast.decode_codes(encoded.codes).sample.dtype == dtype
    cells = encoded.latents.float().permute(0, 2, 3, 1)
    assert torch.equal(encoded.codes, vae.quantizer.encode(cells))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_refused_and_change_nothing(value, make_vae):
    vae, images = make_vae(), random_images()
    images[1, 2, 0, 3] = value
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    calls = [vae.encode, vae, lambda images: vae.train()(images), lambda images: vae(images, quantize=False)]
    for call in calls:
        with pytest.raises(ValueError, match="`images` must be finite"):
            call(images)
    with pytest.raises(ValueError, match="`latents` must be finite"):
        vae.decode(torch.full((1, 4, 2, 3), value))
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_where_the_host_may_not_look_broken_images_make_the_loss_nan_and_leave_the_codebook(
    value, make_vae, monkeypatch
):
    monkeypatch.setattr(autoencoder_rqvae, "can_look", lambda tensor: False)  # as on a GPU
    vae, images = make_vae().train(), random_images()
    images[0, 0, 1, 1] = value
    before = {name: tensor.clone() for name, tensor in vae.named_buffers()}
    output = vae(images)
    assert output.commitment_loss.isnan() and F.mse_loss(output.sample, images).isnan()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.named_buffers())
    with pytest.raises(ValueError, match="`images` must be finite"):
        vae.encode(images)


def test_broken_weights_give_no_codes_and_in_training_a_loss_that_is_nan(make_vae):
    vae, images = make_vae(), random_images()
    vae.quant_conv.weight.data[0] = torch.nan
    for call in (vae.encode, vae):
        with pytest.raises(ValueError, match="weights are broken"):
            call(images)
    before = vae.quantizer.codebooks.clone()
    assert vae.train()(images).commitment_loss.isnan()
    assert torch.equal(vae.quantizer.codebooks, before)
