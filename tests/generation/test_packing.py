"""Proves models that are packed for a CPU: the same codes and scores, saved and undone exactly, else a clear error."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from dnd_hf.generation.packed_weights import KEPT_WEIGHTS
from dnd_hf.ops.cpu_precision import has_instructions


HAS_BFLOAT16 = has_instructions(torch.device("cpu"), torch.bfloat16)
OPTIONS = dict(guidance_scale=1.5, generator=[3, 4])


@pytest.fixture(params=["dnd", "dnd in bfloat16", "dnd with shared heads", "rq", "rq with a prompt"])
def model(request, make_model, make_rq_model):
    if request.param.startswith("dnd"):
        model = make_model(tie_prediction_heads="shared" in request.param, num_key_value_heads=1)
    else:
        text = dict(prompt_length=3, prompt_vocab_size=7) if "prompt" in request.param else {}
        model = make_rq_model(class_dropout_prob=0.1, **text)
    if "bfloat16" not in request.param:
        return model
    if not HAS_BFLOAT16:
        pytest.skip("this CPU has no instructions for bfloat16")
    return model.bfloat16()


@pytest.fixture
def conditions(model, make_rq_inputs, make_inputs):
    inputs = make_inputs if hasattr(model, "embed_tokens") else make_rq_inputs
    return inputs(model)[0]


def test_codes_and_scores_of_a_packed_model_are_those_from_before(model, conditions):
    codes = model.generate(conditions, **OPTIONS)
    scores = model.score(conditions, codes)
    model.pack_for_cpu()
    assert model.is_packed_for_cpu and not KEPT_WEIGHTS[model].products
    assert torch.equal(model.generate(conditions, **OPTIONS), codes)
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    torch.testing.assert_close(model.score(conditions, codes).log_probs, scores.log_probs, rtol=0, atol=tolerance)
    distributions = model.code_distributions(conditions, codes)
    torch.testing.assert_close(distributions.log_probs, scores.log_probs, rtol=0, atol=tolerance)


def test_unpacking_gives_every_weight_back_exactly(model, conditions):
    model.requires_grad_(False)
    model.heads.requires_grad_(True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    codes = model.generate(conditions, **OPTIONS)
    for _ in range(2):
        model.pack_for_cpu()
        model.pack_for_cpu()  # nothing more to do
        model.unpack_weights()
    assert not model.is_packed_for_cpu
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], weight) for name, weight in before.items())
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags
    assert all(not hasattr(module, "product") for module in model.modules())
    assert torch.equal(model.generate(conditions, **OPTIONS), codes)
    model(conditions, codes, labels=codes).loss.backward()
    assert model.heads[0].weight.grad is not None


def test_a_packed_model_is_saved_as_the_same_files(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    model.pack_for_cpu()
    model.save_pretrained(tmp_path / "packed")
    names = {file.name for file in (tmp_path / "plain").iterdir()}
    assert names == {file.name for file in (tmp_path / "packed").iterdir()} and "model.safetensors" in names
    for name in names:
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_what_needs_the_weights_says_that_they_are_packed(model, conditions):
    codes = model.generate(conditions, **OPTIONS)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.pack_for_cpu()
    other = torch.bfloat16 if model.dtype == torch.float32 else torch.float32
    refused = [
        lambda: model(conditions, codes, labels=codes),
        lambda: model.train()(conditions, codes, labels=codes),
        lambda: model.layers[0].mlp.down_proj(torch.zeros(1, 24)),
        lambda: model.load_state_dict(state),
        lambda: model.to(other),
        lambda: model.to("meta"),
        lambda: copy.deepcopy(model),
        lambda: pickle.dumps(model),
    ]
    for action in refused:
        with pytest.raises(RuntimeError, match=r"unpack_weights\(\)"):
            action()
    assert {weight.dtype for weight in model.parameters()} == {model.dtype}
    model.eval().to("cpu").to(model.dtype)
    assert torch.equal(model.generate(conditions, **OPTIONS), codes)


def test_parameters_count_as_before(model):
    count = model.num_parameters()
    model.pack_for_cpu()
    assert model.num_parameters() == count and model.device.type == "cpu"


def test_models_that_do_not_run_packed_are_not_packed(make_model):
    hooked = make_model()
    hooked.layers[0].register_forward_hook(lambda *_: None)
    for model in (hooked, make_model().half()):
        with pytest.raises(ValueError, match="pack_for_cpu"):
            model.pack_for_cpu()
        assert not model.is_packed_for_cpu


def test_a_pipeline_of_a_packed_model_samples_scores_and_saves(make_pipeline, tmp_path):
    pipe = make_pipeline()
    images = pipe([0, 1], generator=[0, 1], output_type="pt").images
    scores = pipe.score(images, [0, 1])
    pipe.transformer.pack_for_cpu()
    pipe.to("cpu")
    assert torch.equal(pipe([0, 1], generator=[0, 1], output_type="pt").images, images)
    torch.testing.assert_close(pipe.score(images, [0, 1]), scores, rtol=1e-4, atol=1e-4)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again([0, 1], generator=[0, 1], output_type="pt").images, images)


PEAK = """
import gc, sys, torch
from dnd_hf import DnDConfig, DnDForImageGeneration, RQTransformerConfig, RQTransformerForImageGeneration

def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

def make(width, vocab_size):
    sizes = dict(hidden_size=width, num_attention_heads=width // 64, vocab_size=vocab_size, grid_size=(2, 2))
    with torch.device("meta"):
        if sys.argv[1] == "dnd":
            config = DnDConfig(num_hidden_layers=12, prediction_layers=[9, 11], class_dropout_prob=0.0, **sizes)
            model = DnDForImageGeneration(config)
        else:
            config = RQTransformerConfig(num_hidden_layers=9, num_depth_layers=3, code_vector_size=64, **sizes)
            model = RQTransformerForImageGeneration(config)
    model = model.to(getattr(torch, sys.argv[2])).to_empty(device="cpu").eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)
    return model

def sample(model):
    model.pack_for_cpu()
    model.generate([0, 1], positions_per_pass=1)

sample(make(64, 64))  # loads code and kernels that any model needs
before = resident("VmRSS")
model = make(768, 4096)
weights = sum(tensor.nbytes for tensor in model.state_dict().values())
sample(model)
print((resident("VmHWM") - before) / weights)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("architecture", ["dnd", "rq"])
def test_packing_and_sampling_need_at_most_1_15_times_the_memory_of_the_weights(architecture):
    line = [sys.executable, "-c", PEAK, architecture, "bfloat16" if HAS_BFLOAT16 else "float32"]
    run = subprocess.run(line, capture_output=True, text=True, check=True)
    assert 0.9 < float(run.stdout) < 1.15
