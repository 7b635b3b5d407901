"""Holds the models against what users of transformers and diffusers expect of any model."""

import copy

import accelerate
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import AutoModel

from dnd_hf import RQVAE, DnDConfig
from dnd_hf.generation.packed_decoder import can_run_packed


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=["transformer", "rq-transformer", "tokenizer"])
def case(request, make_model, make_rq_model, make_vae, make_inputs, make_rq_inputs):
    """A function that makes a model, the same in each call, and one that maps a model to all of its outputs."""
    if request.param == "rq-transformer":
        labels, codes = make_rq_inputs(make_rq_model())
        return make_rq_model, lambda model: model(labels, codes, labels=codes, return_dict=False)
    if request.param == "tokenizer":
        images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return make_vae, lambda vae: vae(images.to(vae.dtype), return_dict=False)
    labels, codes = make_inputs(make_model())
    return make_model, lambda model: model(labels, codes, labels=codes, return_dict=False)


def assert_equal(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(outputs) == len(expected) > 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_model_of_any_precision_is_itself_again_after_saving(dtype, case, tmp_path):
    make, run = case
    model = make().to(dtype)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert loaded.dtype == dtype and not loaded.training
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name
    assert_equal(run(loaded), run(model))


@torch.no_grad()
def test_codebooks_are_float32_whatever_a_tokenizer_is_stored_or_loaded_as(make_vae, tmp_path):
    codebooks = make_vae().quantizer.codebooks
    for dtype in DTYPES:
        make_vae().to(dtype).save_pretrained(tmp_path)
        for loaded_as in DTYPES:
            loaded = RQVAE.from_pretrained(tmp_path, dtype=loaded_as).quantizer.codebooks
            assert loaded.dtype == torch.float32 and torch.equal(loaded, codebooks)


@torch.no_grad()
def test_the_same_call_gives_the_same_outputs_in_evaluation_mode(case):
    make, run = case
    model = make()
    assert_equal(run(model), run(model))
    assert_equal(run(copy.deepcopy(model)), run(model))


@torch.no_grad()
def test_outputs_are_the_same_by_name_and_in_a_tuple(make_model, make_inputs, make_rq_model, make_rq_inputs, make_vae):
    rq, prompted = make_rq_model(), make_rq_model(prompt_length=3, prompt_vocab_size=7, num_classes=0)
    of_prompt = ["prompt_loss", "prompt_logits"]
    cases = ((make_model(), make_inputs, []), (rq, make_rq_inputs, []), (prompted, make_rq_inputs, of_prompt))
    for model, make, more in cases:
        conditions, codes = make(model)
        output = model(conditions, codes, labels=codes)
        assert_equal(model(conditions, codes, labels=codes, return_dict=False), output.to_tuple())
        assert list(output) == ["loss", "depth_losses", "logits", *more]
    vae, images = make_vae(), torch.zeros(1, 3, 4, 6)
    for call, names in (
        (vae, ["sample", "codes", "commitment_loss"]),
        (vae.encode, ["latents", "codes", "commitment_loss"]),
    ):
        output = call(images)
        assert list(output) == names
        assert_equal(call(images, return_dict=False), output.to_tuple())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32])
@torch.no_grad()
def test_integers_of_every_type_are_classes_codes_and_labels(
    dtype, make_model, make_inputs, make_rq_model, make_rq_inputs
):
    prompted = make_rq_model(prompt_length=3, prompt_vocab_size=7, num_classes=0)
    for model, make in ((make_model(), make_inputs), (make_rq_model(), make_rq_inputs), (prompted, make_rq_inputs)):
        conditions, codes = make(model)
        narrow = conditions.to(dtype), codes.to(dtype)
        for output_logits in (True, False):
            loss = model(conditions, codes, labels=codes, output_logits=output_logits).loss
            assert torch.equal(model(*narrow, labels=narrow[1], output_logits=output_logits).loss, loss)


@torch.no_grad()
def test_each_sample_of_a_batch_is_computed_as_if_it_were_alone(make_model, make_inputs, make_vae):
    model = make_model()
    labels, codes = make_inputs(model, batch=3)
    logits = model(labels, codes).logits
    alone = torch.cat([model(label[None], code[None]).logits for label, code in zip(labels, codes)])
    torch.testing.assert_close(alone, logits, rtol=1e-5, atol=1e-5)
    vae, images = make_vae(), torch.rand(3, 3, 4, 6)
    torch.testing.assert_close(torch.cat([vae(image[None]).sample for image in images]), vae(images).sample)


def test_every_weight_is_trained(case):
    make, run = case
    model = make().train()
    outputs = run(model)
    loss = outputs[0].square().mean() + outputs[2] if isinstance(model, RQVAE) else outputs[0]
    loss.backward()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    # a bias before the softmax of the attention keys cancels
    assert all(name.endswith("to_k.bias") for name in silent), silent


@torch.no_grad()
def test_accelerate_offloads_weights_and_the_outputs_stay(case, tmp_path):
    make, run = case
    expected = run(make())
    model = make()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert_equal(run(model), expected)

    make().save_pretrained(tmp_path / "model")
    half = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) // 2
    on_disk = type(model).from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": half}, offload_folder=tmp_path / "offloaded"
    )
    assert "disk" in on_disk.hf_device_map.values()
    assert_equal(run(on_disk), expected)


@torch.no_grad()
def test_an_offloaded_tokenizer_encodes_and_decodes(make_vae):
    vae, images = make_vae(), torch.rand(2, 3, 4, 6)
    codes = vae.encode(images).codes
    offloaded = make_vae()
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    assert torch.equal(offloaded.encode(images).codes, codes)
    assert torch.equal(offloaded.decode_codes(codes).sample, vae.decode_codes(codes).sample)


@pytest.mark.parametrize("options", [dict(max_shard_size="5KB"), dict(variant="fp16")])
@torch.no_grad()
def test_shards_and_variants_load(options, case, tmp_path):
    make, run = case
    model = make()
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in options)
    variant = {name: value for name, value in options.items() if name == "variant"}
    assert_equal(run(type(model).from_pretrained(tmp_path, **variant)), run(model))


@torch.no_grad()
def test_repeated_blocks_compile(case):
    make, run = case
    expected, model = run(make()), make()
    model.compile_repeated_blocks(backend="eager")
    for ours, theirs in zip(run(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_configuration_makes_a_model_of_the_same_configuration(make_vae, make_config, tmp_path):
    vae = make_vae(code_patch_size=(1, 3), shared_codebook=False, vq_embed_dim=3)
    vae.save_config(tmp_path)
    again = RQVAE.from_config(RQVAE.load_config(tmp_path))
    names = [name for name in vae.config if not name.startswith("_")]
    assert len(names) > 15
    for name in names:
        ours, theirs = again.config[name], vae.config[name]
        assert ours == (list(theirs) if isinstance(theirs, tuple) else theirs), name
    assert again.grid_size == vae.grid_size and again.code_stride == vae.code_stride
    config = make_config(code_depth=3)
    assert AutoModel.from_config(DnDConfig(**config.to_dict())).config.to_dict() == config.to_dict()


@torch.no_grad()
def test_the_ema_of_diffusers_follows_the_weights(case):
    make, _ = case
    model = make()
    average = EMAModel(model.parameters(), decay=0.5)
    average.optimization_step = 100  # past its warm-up
    first = next(model.parameters())
    before = first.clone()
    first.add_(1)
    average.step(model.parameters())
    torch.testing.assert_close(average.shadow_params[0], before + 0.5)


def test_layerwise_casting_leaves_the_codebooks(make_vae):
    vae, images = make_vae(), torch.rand(1, 3, 4, 6)
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert vae.encoder.conv_in.weight.dtype == torch.float8_e4m3fn
    assert vae.quantizer.codebooks.dtype == vae(images).sample.dtype == torch.float32


def test_input_embeddings_are_those_of_the_codes(make_model):
    model = make_model()
    assert model.get_input_embeddings() is model.embed_tokens and model.get_output_embeddings() is None
    model.set_input_embeddings(nn.Embedding(11, 16))
    assert model.get_input_embeddings() is model.embed_tokens


def test_gradients_of_captured_states_can_be_kept(make_model, make_inputs):
    model = make_model()
    model.set_attn_implementation("eager")
    labels, codes = make_inputs(model)
    output = model(labels, codes, labels=codes, output_hidden_states=True, output_attentions=True)
    states = (output.hidden_states[0], output.attentions[0])
    for state in states:
        state.retain_grad()
    output.loss.backward()
    assert all(state.grad.any() for state in states)


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_layers_that_ran(make_model, make_inputs):
    model = make_model(num_hidden_layers=4, prediction_layers=[0, 2])
    model.set_attn_implementation("eager")
    labels, codes = make_inputs(model)
    expected = model(labels, codes)
    assert expected.hidden_states is None and expected.attentions is None
    output = model(labels, codes, output_hidden_states=True, output_attentions=True)
    assert torch.equal(output.logits, expected.logits)
    assert len(output.hidden_states) == 4 and all(state.shape == (2, 6, 16) for state in output.hidden_states)
    for state, norm, head, depth in ((1, 0, 0, 0), (3, 1, 1, 1)):  # outputs of layers 0 and 2
        logits = model.heads[head](model.norms[norm](output.hidden_states[state]))
        assert torch.equal(logits, output.logits[:, :, depth])
    first = torch.cat([model.embed_classes(labels)[:, None], model.embed_tokens(codes.flatten(1, 2)[:, :-1]).sum(2)], 1)
    assert torch.equal(output.hidden_states[0], first)
    assert len(output.attentions) == 3
    for weights in output.attentions:
        assert weights.shape == (2, 2, 6, 6) and not weights.triu(1).any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 6))
    as_tuple = model(labels, codes, labels=codes, output_hidden_states=True, return_dict=False)
    assert len(as_tuple) == 4 and len(as_tuple[3]) == 4
    model.config.output_hidden_states = True
    assert len(model(labels, codes).hidden_states) == 4


@torch.no_grad()
def test_hidden_states_and_attentions_of_an_rq_transformer_are_those_of_its_body(make_rq_model, make_rq_inputs):
    model = make_rq_model(prompt_length=3, prompt_vocab_size=7, num_classes=0)
    model.set_attn_implementation("eager")
    conditions, codes = make_rq_inputs(model)
    expected = model(conditions, codes)
    output = model(conditions, codes, output_hidden_states=True, output_attentions=True)
    assert torch.equal(output.logits, expected.logits) and expected.hidden_states is None
    assert [state.shape for state in output.hidden_states] == 3 * [(2, 8, 16)]  # 3 words and 5 cells
    assert torch.equal(output.hidden_states[0][:, :3], model.condition_tokens(conditions))
    context = model.run_body(conditions, codes.flatten(1, 2))[1]
    assert torch.equal(output.hidden_states[2][:, 2:], context)
    assert len(output.attentions) == 2
    for weights in output.attentions:
        assert weights.shape == (2, 2, 8, 8) and not weights.triu(1).any()


@pytest.mark.parametrize("architecture", ["dnd", "rq"])
def test_capturing_hidden_states_leaves_generation_fast_and_its_codes_as_they_are(
    architecture, make_model, make_inputs, make_rq_model, make_rq_inputs
):
    make, inputs = (make_model, make_inputs) if architecture == "dnd" else (make_rq_model, make_rq_inputs)
    model = make()
    codes = model.generate([0, 1], do_sample=False)
    model(*inputs(model), output_hidden_states=True)
    assert can_run_packed(model)
    assert torch.equal(model.generate([0, 1], do_sample=False), codes)


def test_the_vocabulary_is_the_codebook_s_and_is_not_resized(make_model, make_rq_model):
    for model in (make_model(), make_rq_model()):
        with pytest.raises(NotImplementedError, match="codebook"):
            model.resize_token_embeddings(12)
