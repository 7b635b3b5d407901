"""Proves what is kept of packed weights: made once, never of weights that have changed, freed with the model."""

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dnd_hf.generation import packed_weights
from dnd_hf.generation.packed_weights import KEPT_WEIGHTS, product_groups


GREEDY = dict(do_sample=False, guidance_scale=1.5)


@pytest.fixture
def packings(monkeypatch) -> list:
    """A list of the groups of layers that have been packed so far."""
    packed, joined = [], packed_weights.joined
    monkeypatch.setattr(packed_weights, "joined", lambda group: packed.append(group) or joined(group))
    return packed


@pytest.fixture(params=["dnd", "rq"])
def make(request, make_model, make_rq_model):
    """Makes a model of either architecture that has a null class."""
    if request.param == "dnd":
        return make_model
    return lambda **options: make_rq_model(class_dropout_prob=0.1, **options)


def codes_of_plain_layers(model) -> torch.Tensor:
    """The greedy codes by the model's layers as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dnd_hf.generation.mixin.can_run_packed", lambda model: False)
        return model.generate([0, 3], **GREEDY)


def test_weights_are_packed_once_whatever_the_batch_and_the_guidance(make, packings):
    model = make()
    groups = product_groups(model)
    codes = model.generate([0, 3], **GREEDY)
    assert len(packings) == len(groups)
    assert torch.equal(model.generate([0, 3], **GREEDY), codes)
    model.generate([0, 1, 2], guidance_scale=1.0, positions_per_pass=3, generator=0)
    assert len(packings) == len(groups)


def training_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    inputs = torch.tensor([0, 3]), torch.zeros(2, *model.config.grid_size, model.config.code_depth, dtype=torch.long)
    model(*inputs, labels=inputs[1]).loss.backward()
    optimizer.step()


def load_other_weights(model):
    model.load_state_dict({name: -weight for name, weight in model.state_dict().items()})


def assign_other_weights(model):
    model.load_state_dict({name: -weight for name, weight in model.state_dict().items()}, assign=True)


def write_past_the_version_counter(model):
    for weight in model.parameters():  # as averages of weights are copied into a model
        weight.data.copy_(weight.data.flip(0))


def merge_adapters(model):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    assert get_peft_model(model, config).merge_and_unload() is model


def change_precision_and_back(model):
    model.to(torch.bfloat16).to(torch.float32)


def replace_a_layer(model):
    model.layers[0] = copy.deepcopy(model.layers[1])
    model.layers[0].mlp.down_proj.weight.data.neg_()


CHANGES = [
    training_step,
    load_other_weights,
    assign_other_weights,
    write_past_the_version_counter,
    merge_adapters,
    change_precision_and_back,
    replace_a_layer,
]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_have_changed_are_packed_anew(change, make, packings):
    model = make(vocab_size=101)
    before = model.generate([0, 3], **GREEDY)
    count = len(packings)
    change(model)
    model.eval()
    after = model.generate([0, 3], **GREEDY)
    assert len(packings) > count
    assert torch.equal(after, codes_of_plain_layers(model))
    if change is not change_precision_and_back:  # rounded weights may give the same codes
        assert not torch.equal(after, before)


def test_norms_biases_and_settings_that_have_changed_are_read_anew(make, make_rq_model):
    model, biased = make(vocab_size=101), make_rq_model(vocab_size=101)
    before = model.generate([0, 3], **GREEDY), biased.generate([0, 3], do_sample=False)
    with torch.inference_mode():
        for layer in model.layers:
            layer.input_layernorm.weight.mul_(torch.linspace(0, 2, 16))
            layer.mlp.act_fn = torch.nn.Tanh()
        biased.layers[0].self_attn.v_proj.bias.data.neg_()
    after = model.generate([0, 3], **GREEDY)
    assert not torch.equal(after, before[0]) and torch.equal(after, codes_of_plain_layers(model))
    assert not torch.equal(biased.generate([0, 3], do_sample=False), before[1])


def test_only_what_has_changed_is_packed_anew_and_what_is_stale_is_dropped(make, packings):
    model = make()
    model.generate([0], **GREEDY)
    kept = KEPT_WEIGHTS[model].products
    count = len(packings)
    model.layers[1].mlp.down_proj.weight.data[3, 2] += 1e-6
    model.generate([0], **GREEDY)
    assert packings[count:] == [[model.layers[1].mlp.down_proj]]
    assert len(KEPT_WEIGHTS[model].products) == len(kept)


def test_threads_that_generate_at_the_same_time_share_one_packing(make, packings):
    model = make()
    barrier = threading.Barrier(4)

    def generate(label):
        barrier.wait()
        return model.generate([label], generator=[label], guidance_scale=1.5)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(generate, range(4)))
    assert len(packings) == len(product_groups(model))
    for label, codes in enumerate(together):
        assert torch.equal(codes, model.generate([label], generator=[label], guidance_scale=1.5))


def test_a_model_in_training_keeps_no_packed_weights(make):
    model = make().train()
    model.generate([0], **GREEDY)
    assert not KEPT_WEIGHTS[model].products
    model.eval().generate([0], **GREEDY)
    assert KEPT_WEIGHTS[model].products
    model.train().generate([0], **GREEDY)
    assert not KEPT_WEIGHTS[model].products


def test_packed_weights_end_with_their_model(make):
    model = make()
    model.generate([0], **GREEDY)
    products = [weakref.ref(product) for product in KEPT_WEIGHTS[model].products.values()]
    del model
    gc.collect()
    assert all(product() is None for product in products)


def test_copies_and_saved_models_have_packed_weights_of_their_own(make, tmp_path):
    model = make()
    codes = model.generate([0, 3], **GREEDY)
    model.save_pretrained(tmp_path)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), type(model).from_pretrained(tmp_path)]
    for other in copies:
        assert other not in KEPT_WEIGHTS
        for weight in other.parameters():
            weight.data.neg_()
        assert not torch.equal(other.generate([0, 3], **GREEDY), codes)
    assert torch.equal(model.generate([0, 3], **GREEDY), codes)
