"""What train.py makes of each architecture: models that predict the codes of the tokenizer, by the paper's settings."""

import pytest
import torch

from dnd_hf import DnDForImageGeneration, RQTransformerForImageGeneration
from dnd_hf.training.architectures import ARCHITECTURES


TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
DATA = dict(grid_size=(2, 3), num_classes=3)


@pytest.mark.parametrize("shared", [True, False])
def test_a_new_rq_transformer_reads_the_code_vectors_of_the_tokenizer(shared, make_vae):
    vae = make_vae(shared_codebook=shared)
    model = ARCHITECTURES["rq_transformer"].make("480M", TINY, vae, **DATA)
    assert type(model) is RQTransformerForImageGeneration
    assert torch.equal(model.code_vectors, vae.quantizer.codebooks)
    config = model.config
    assert (config.vocab_size, config.code_depth, config.hidden_size, config.num_depth_layers) == (11, 2, 16, 4)
    model.check_code_vectors(vae.quantizer.codebooks)


def test_a_new_dnd_transformer_has_its_last_head_at_the_last_layer(make_vae):
    make = ARCHITECTURES["dnd"].make
    model = make("B", {**TINY, "prediction_layers": [0, 1]}, make_vae(), **DATA)
    assert type(model) is DnDForImageGeneration and model.config.prediction_layers == [0, 1]
    with pytest.raises(ValueError, match="`prediction_layers` must be the last layer"):
        make("B", {**TINY, "num_hidden_layers": 3, "prediction_layers": [0, 1]}, make_vae(), **DATA)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_defaults_are_those_of_the_configuration(name):
    architecture = ARCHITECTURES[name]
    options = {option: value for option, value in architecture.options.items() if value is not None}
    plain = architecture.config_class.from_size(architecture.default_size)
    assert options.items() <= plain.to_dict().items()
    assert architecture.default_size in architecture.sizes


def test_the_learning_rates_are_the_papers():
    assert ARCHITECTURES["dnd"].learning_rate(512) == 2e-4
    assert ARCHITECTURES["rq_transformer"].learning_rate(512) == 5e-4
