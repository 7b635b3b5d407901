"""Proves that options which only a new model can have are refused where a model is trained further."""

import importlib
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
OF_A_DATA_SET = dict(vocab_size=11, code_depth=2, grid_size=[2, 3], num_classes=4)


@pytest.fixture
def make_tokenizer(make_vae, tmp_path, monkeypatch):
    """The tokenizer that train_rqvae.py makes from a saved one and options of the model."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    make_vae().save_pretrained(tmp_path / "vqvae")
    script = importlib.import_module("train_rqvae")
    return lambda **options: script.RQVAEArguments(
        dataset_name="words", pretrained_vqvae=str(tmp_path / "vqvae"), **options
    ).make_vae()


@pytest.fixture
def make_transformer(make_model, make_vae, tmp_path, monkeypatch):
    """The transformer that train.py makes, likewise."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    make_model().save_pretrained(tmp_path / "transformer")
    script, folder = importlib.import_module("train"), str(tmp_path / "transformer")
    return lambda **options: script.DnDArguments(
        codes_dir="codes", pretrained_transformer=folder, **options
    ).make_transformer(make_vae(), **OF_A_DATA_SET)


@pytest.mark.parametrize(
    "options", [{}, dict(sample_size=[4, 6]), dict(block_out_channels=[8, 8], norm_num_groups=4, codebook_decay=0.99)]
)
def test_a_tokenizer_may_be_given_its_own_options(options, make_tokenizer):
    assert make_tokenizer(**options).config.latent_channels == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sample_size=[8]), r"has sample_size \(4, 6\), not \(8, 8\): leave these options out"),
        (dict(code_depth=3, commitment_weight=0.5), r"has code_depth 2, not 3, commitment_weight 0\.25, not 0\.5:"),
        (dict(local_encoder=True), "has local_encoder False, not True"),
    ],
)
def test_a_tokenizer_has_no_other_options_than_its_own(options, message, make_tokenizer):
    with pytest.raises(ValueError, match=message):
        make_tokenizer(**options)


@pytest.mark.parametrize("options", [{}, dict(hidden_size=16, prediction_layers=[1, 2], residual_dropout=0.0)])
def test_a_transformer_may_be_given_its_own_options(options, make_transformer):
    assert make_transformer(**options).config.hidden_size == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(hidden_size=32), "has hidden_size 16, not 32: leave these options out"),
        (dict(residual_dropout=0.1, depth_mode="parallel"), r"residual_dropout 0\.0, not 0\.1"),
    ],
)
def test_a_transformer_has_no_other_options_than_its_own(options, message, make_transformer):
    with pytest.raises(ValueError, match=message):
        make_transformer(**options)
