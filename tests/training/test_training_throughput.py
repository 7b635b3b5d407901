"""dnd_hf.training.throughput: the operations it counts are those that PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dnd_hf.training import throughput
from dnd_hf.training.throughput import peak_flops, peak_memory, tokenizer_training_flops, transformer_training_flops


@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_prediction_heads": True}, {"num_key_value_heads": 1}, {"code_depth": 1, "prediction_layers": [1]}],
)
def test_the_transformers_operations(overrides, make_model, make_inputs):
    model = make_model(**overrides).train()
    model.set_attn_implementation("eager")  # every product is one that the counter sees
    labels, codes = make_inputs(model, batch=3)
    with FlopCounterMode(display=False) as counter:
        model(labels, codes, labels=codes).loss.backward()
    if "num_key_value_heads" in overrides:
        assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert 3 * transformer_training_flops(model.config) == counter.get_total_flops()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"prompt_length": 4, "prompt_vocab_size": 7, "depth_reads_code_vectors": False},
        {
            "body_reads_code_vectors": False,
            "tie_prediction_heads": False,
            "num_depth_layers": 1,
            "intermediate_size": 8,
        },
    ],
)
def test_the_rq_transformers_operations(overrides, make_rq_model, make_rq_inputs):
    model = make_rq_model(**overrides).train()
    model.set_attn_implementation("eager")
    conditions, codes = make_rq_inputs(model, batch=3)
    with FlopCounterMode(display=False) as counter:
        model(conditions, codes, labels=codes).loss.backward()
    assert 3 * transformer_training_flops(model.config) == counter.get_total_flops()


def test_the_tokenizers_operations(make_vae):
    # Without attention, whose kernel for CPUs the counter does not know.
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = make_vae(sample_size=(8, 12), mid_block_add_attention=False, **blocks).train()
    images = torch.rand(2, 3, 8, 12)
    with FlopCounterMode(display=False) as counter:
        latents = vae.encoder(images.requires_grad_())
        vae.decoder(latents).sum().backward()
    assert 2 * tokenizer_training_flops(vae, (8, 12)) == counter.get_total_flops()
    assert next(vae.parameters()).device.type == "cpu"


def test_a_rate_and_a_peak_are_measured():
    cpu = torch.device("cpu")
    assert 1e8 < peak_flops(cpu, torch.float32, torch.bfloat16) < 1e15
    assert torch.get_float32_matmul_precision() == "highest"
    size = 5 * 10**8
    block = torch.ones(size, dtype=torch.uint8)
    assert size / 1e9 <= peak_memory(torch.device("cpu")) < 100
    del block


def test_precisions_that_a_cpu_emulates_are_not_measured_beside_others(monkeypatch):
    measured = []
    monkeypatch.setattr(throughput, "has_instructions", lambda device, dtype: dtype == torch.float32)
    monkeypatch.setattr(throughput, "_product_rate", lambda size, device, dtype: measured.append(dtype) or size)
    assert peak_flops(torch.device("cpu"), torch.float32, torch.bfloat16) == 2048
    assert set(measured) == {torch.float32}
    measured.clear()
    peak_flops(torch.device("cpu"), torch.bfloat16)
    assert set(measured) == {torch.bfloat16}
