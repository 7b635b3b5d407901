"""Proves the configuration of the RQ-Transformer: the published sizes, what saving keeps, and what it refuses."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from dnd_hf import RQTransformerConfig, RQTransformerForImageGeneration


TEXT = dict(prompt_length=32, prompt_vocab_size=16384)


@pytest.mark.parametrize(
    ("size", "options", "stated", "unit"),
    [
        ("355M", dict(num_classes=1, vocab_size=2048), 355, 1e6),
        ("355M", dict(num_classes=1), 370, 1e6),
        ("612M", dict(num_classes=1), 612, 1e6),
        ("480M", dict(), 480, 1e6),
        ("821M", dict(), 821, 1e6),
        ("1.4B", dict(), 1.4, 1e9),
        ("3.8B", dict(), 3.8, 1e9),
        ("612M", TEXT, 654, 1e6),
        ("3.8B", TEXT, 3.9, 1e9),
    ],
)
def test_a_published_size_has_its_number_of_parameters(size, options, stated, unit):
    with torch.device("meta"):
        model = RQTransformerForImageGeneration(RQTransformerConfig.from_size(size, **options))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / unit == pytest.approx(stated, rel=0.01)


def test_default_is_the_1_4b_model_for_imagenet():
    config = RQTransformerConfig()
    assert config.to_dict() == RQTransformerConfig.from_size("1.4B").to_dict()
    assert config.num_classes == config.num_labels == 1000 and not config.has_null_class
    assert config.intermediate_size == 4 * 1536 and config.num_depth_attention_heads == 24
    assert config.grid_size == [8, 8] and config.sequence_length == 64 and config.code_depth == 4


def test_a_prompt_takes_the_place_of_classes():
    config = RQTransformerConfig(**TEXT)
    assert config.num_classes == 0 and config.num_conditions == 16384
    assert RQTransformerConfig(num_classes=7).num_conditions == 7


def test_saving_keeps_every_value(tmp_path):
    config = RQTransformerConfig(
        vocab_size=8,
        hidden_size=24,
        num_attention_heads=3,
        num_depth_attention_heads=2,
        hidden_act="quick_gelu",
        depth_hidden_act="gelu",
        grid_size=(2, 5),
        num_classes=3,
        class_dropout_prob=0.2,
        body_reads_code_vectors=False,
        sum_code_vectors=False,
        shared_codebook=False,
        tie_prediction_heads=False,
        id2label={0: "a", 1: "b", 2: "c"},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is RQTransformerConfig and loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.id2label == {0: "a", 1: "b", 2: "c"}
    with torch.device("meta"):
        assert type(AutoModel.from_config(loaded)) is RQTransformerForImageGeneration


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vocab_size", dict(vocab_size=0)),
        ("num_depth_layers", dict(num_depth_layers=0)),
        ("code_depth", dict(code_depth=0)),
        ("num_attention_heads", dict(num_attention_heads=7)),
        ("num_depth_attention_heads", dict(num_depth_attention_heads=7)),
        ("hidden_act", dict(hidden_act="relu")),
        ("depth_hidden_act", dict(depth_hidden_act="relu")),
        ("grid_size", dict(grid_size=(0, 3))),
        ("num_classes", dict(num_classes=0)),
        ("class_dropout_prob", dict(class_dropout_prob=1.0)),
        ("residual_dropout", dict(residual_dropout=-0.1)),
        ("prompt_length", dict(prompt_length=1, prompt_vocab_size=5)),
        ("prompt_vocab_size", dict(prompt_length=3)),
        ("prompt_vocab_size", dict(prompt_vocab_size=3)),
        ("num_classes", dict(num_classes=10, **TEXT)),
        ("prompt_loss_weight", dict(prompt_loss_weight=1.5)),
        ("code_vector_size", dict(code_vector_size=0)),
        ("id2label", dict(num_classes=2, id2label={0: "only"})),
        ("id2label", dict(num_classes=2, id2label={1: "one", 2: "two"})),
        ("num_labels", dict(num_classes=2, num_labels=3)),
        ("hidden_size", dict(hidden_size=2**20)),
        ("hidden_size", dict(hidden_size=96.0)),
        ("shared_codebook", dict(shared_codebook="yes")),
        ("tie_word_embeddings", dict(tie_word_embeddings=True)),
        ("layer_norm_eps", dict(layer_norm_eps=0.0)),
    ],
)
def test_what_no_model_can_have_is_refused_by_name(name, options):
    with pytest.raises(ValueError, match=f"`{name}`"):
        RQTransformerConfig(**options)


def test_an_unknown_size_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="`size` must be one of 355M"):
        RQTransformerConfig.from_size("XXL")
