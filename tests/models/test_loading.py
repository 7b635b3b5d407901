"""Checkpoints that are not whole are refused, by each model and by the pipeline."""

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from dnd_hf import RQVAE, DnDForImageGeneration, DnDPipeline, RQTransformerForImageGeneration


FILES = {
    "transformer": ("transformer/model.safetensors", "norms.1.weight"),
    "vqvae": ("vqvae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
}


@pytest.fixture
def spoil(make_pipeline, tmp_path):
    """A function that saves a pipeline and changes the weights of one of its models."""

    def make(component: str, change) -> None:
        make_pipeline().save_pretrained(tmp_path)
        file, name = FILES[component]
        weights = load_file(tmp_path / file)
        change(weights, name)
        save_file(weights, tmp_path / file, metadata={"format": "pt"})

    return make


def loaders(component: str, folder):
    model = {"transformer": DnDForImageGeneration, "vqvae": RQVAE}[component]
    yield lambda: model.from_pretrained(folder / component)
    yield lambda: DnDPipeline.from_pretrained(folder)
    yield lambda: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("component", FILES)
def test_a_missing_weight_is_an_error_that_names_it(component, spoil, tmp_path):
    spoil(component, lambda weights, name: weights.pop(name))
    for load in loaders(component, tmp_path):
        with pytest.raises(ValueError, match=f"{FILES[component][1]} is missing"):
            load()


@pytest.mark.parametrize("component", FILES)
def test_a_weight_of_another_shape_is_an_error_that_names_it(component, spoil, tmp_path):
    spoil(component, lambda weights, name: weights.update({name: torch.zeros(5)}))
    for load in loaders(component, tmp_path):
        with pytest.raises(ValueError, match=rf"{FILES[component][1]} has shape \(5,\) instead of \(\d+,\)"):
            load()


def test_weights_of_another_shape_may_be_left_out_on_request_but_not_missing_ones(spoil, tmp_path):
    spoil("transformer", lambda weights, name: weights.update({name: torch.zeros(5)}))
    model, info = DnDForImageGeneration.from_pretrained(
        tmp_path / "transformer", ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [name for name, *_ in info["mismatched_keys"]] == ["norms.1.weight"]
    assert torch.equal(model.norms[1].weight, torch.ones(16))
    spoil("transformer", lambda weights, name: weights.pop(name))
    with pytest.raises(ValueError, match="is missing"):
        DnDForImageGeneration.from_pretrained(tmp_path / "transformer", ignore_mismatched_sizes=True)


def test_the_rq_transformer_is_as_strict(make_rq_model, tmp_path):
    make_rq_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["code_vectors"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="code_vectors is missing"):
        RQTransformerForImageGeneration.from_pretrained(tmp_path)


def test_a_long_list_of_missing_weights_is_cut(spoil, tmp_path):
    spoil("transformer", lambda weights, _: [weights.pop(name) for name in list(weights)[1:]])
    with pytest.raises(ValueError, match=r"(\S+ is missing; ){5}and \d+ more\.$"):
        DnDForImageGeneration.from_pretrained(tmp_path / "transformer")


def test_the_transformer_keeps_its_stored_precision_unless_none_is_asked_for(make_model, tmp_path):
    make_model().to(torch.float16).save_pretrained(tmp_path)
    for options, expected in (
        ({}, torch.float16),
        ({"dtype": None}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
    ):
        assert DnDForImageGeneration.from_pretrained(tmp_path, **options).dtype == expected
