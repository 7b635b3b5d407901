"""Proves the model with layers that are not its own: adapters of PEFT and int8 weights, torchao's where it is there."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TorchAoConfig

from dnd_hf import DnDForImageGeneration
from dnd_hf.ops import linear_cross_entropy


def losses_and_gradients(model, labels, codes, monkeypatch):
    """The loss by way of the logits and without them, each with its gradients."""
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_AT_ONCE", 50)  # few rows a piece
    results = []
    for output_logits in (True, False):
        model.zero_grad()
        loss = model(labels, codes, labels=codes, output_logits=output_logits).loss
        loss.backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        results.append((loss.detach(), {name: parameter.grad for name, parameter in trained.items()}))
    return results


@pytest.mark.parametrize("tied", [False, True])
def test_lora_on_the_heads_learns_from_the_loss_without_logits(tied, make_model, make_inputs, monkeypatch):
    model = make_model(tie_prediction_heads=tied)
    labels, codes = make_inputs(model)
    without_adapter = model(labels, codes, labels=codes).loss
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r"heads\.\d+", init_lora_weights=False))
    (loss, gradients), (other_loss, others) = losses_and_gradients(adapted, labels, codes, monkeypatch)
    assert (loss - without_adapter).abs() > 1e-3
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
    assert len(gradients) == (2 if tied else 4) and all("lora" in name for name in gradients)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7)


class Int8Weight(Tensor):
    """An int8 weight with a scale for each row, which knows of no operation but the linear layer's, as torchao's."""

    @staticmethod
    def __new__(cls, weight: Tensor):
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, requires_grad=False)

    def __init__(self, weight: Tensor):
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.rounded = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            inputs, weight, *bias = args
            return F.linear(inputs, weight.rounded * weight.scale, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} of int8 weights")


def by_hand(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8Weight(module.weight.detach()), requires_grad=False)


def by_torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("quantize", [by_hand, by_torchao])
def test_int8_weights_give_the_same_loss_with_and_without_logits_near_that_of_float32(
    quantize, make_model, make_inputs, monkeypatch
):
    model = make_model()
    labels, codes = make_inputs(model)
    quantized = copy.deepcopy(model)
    quantize(quantized)
    assert type(quantized.heads[0].weight) is not type(model.heads[0].weight)
    (loss, gradients), (other_loss, others) = losses_and_gradients(quantized, labels, codes, monkeypatch)
    assert other_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    exact = model(labels, codes, labels=codes).loss.item()
    assert loss.item() != exact and loss.item() == pytest.approx(exact, rel=0.01)
    name = "embed_tokens.weight"  # not quantized
    torch.testing.assert_close(others[name], gradients[name], rtol=1e-4, atol=1e-6)


def test_a_model_loads_with_int8_weights_and_saves_them(make_model, make_inputs, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = make_model()
    model.save_pretrained(tmp_path / "float32")
    labels, codes = make_inputs(model)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = DnDForImageGeneration.from_pretrained(tmp_path / "float32", quantization_config=config)
    assert type(quantized.heads[0].weight) is not nn.Parameter
    loss = quantized(labels, codes, labels=codes).loss.item()
    exact = model(labels, codes, labels=codes).loss.item()
    assert loss != exact and loss == pytest.approx(exact, rel=0.01)
    quantized.save_pretrained(tmp_path / "int8")
    loaded = DnDForImageGeneration.from_pretrained(tmp_path / "int8")
    assert loaded(labels, codes, labels=codes).loss.item() == loss
    assert torch.equal(loaded.generate([0, 1], do_sample=False), quantized.generate([0, 1], do_sample=False))
