"""Proves the configuration: the paper's sizes and head layers, defaults for any other, and what saving must keep."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from dnd_hf import DnDConfig, DnDForImageGeneration
from dnd_hf.models.configuration_dnd import default_prediction_layers


@pytest.mark.parametrize(
    ("size", "stated", "unit"),
    [("B", 111, 1e6), ("L", 343, 1e6), ("XL", 775, 1e6), ("XXL", 1.4, 1e9), ("XXXL", 2.5, 1e9)],
)
def test_a_size_of_the_paper_has_its_number_of_parameters(size, stated, unit):
    config = DnDConfig.from_size(size, code_depth=1)
    with torch.device("meta"):
        model = DnDForImageGeneration(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / unit, 0 if unit == 1e6 else 1) == stated

    # the same from the formula of a LLaMA block
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    block = 4 * width**2 + 3 * width * inner + 2 * width
    assert count == layers * block + 2 * 16384 * width + 1001 * width + width


def test_another_depth_costs_one_more_norm_and_head_and_a_tied_head_only_the_norm():
    counts = []
    for depth, tied in ((1, False), (2, False), (2, True)):
        config = DnDConfig.from_size("B", code_depth=depth, tie_prediction_heads=tied)
        with torch.device("meta"):
            counts.append(sum(parameter.numel() for parameter in DnDForImageGeneration(config).parameters()))
    assert counts[1] - counts[0] == 768 + 768 * 16384
    assert counts[2] - counts[0] == 768


def test_default_is_the_xxl_model_of_depth_two():
    config = DnDConfig()
    assert config.to_dict() == DnDConfig.from_size("XXL").to_dict()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (48, 1536, 24)
    assert config.head_dim == 64
    assert config.intermediate_size == 4096  # 2/3 * 4 * 1536 = 4096, a multiple of 256 already
    assert config.prediction_layers == [39, 47]
    assert config.grid_size == [16, 16] and config.sequence_length == 256
    assert config.vocab_size == 16384 and config.num_classes == config.num_labels == 1000


@pytest.mark.parametrize(("width", "expected"), [(768, 2048), (1024, 2816), (1280, 3584), (2048, 5632), (96, 256)])
def test_width_of_the_mlp_follows_the_llama_rule(width, expected):
    assert DnDConfig(hidden_size=width, num_attention_heads=width // 32).intermediate_size == expected
    assert DnDConfig(intermediate_size=123).intermediate_size == 123


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(1, [47]), (2, [39, 47]), (4, [38, 41, 44, 47]), (8, [26, 29, 32, 35, 38, 41, 44, 47])],
)
def test_default_head_layers_at_48_layers_are_the_released_ones(depth, expected):
    assert default_prediction_layers(48, depth) == expected
    assert DnDConfig(code_depth=depth).prediction_layers == expected


def test_default_head_layers_are_valid_for_every_depth_and_layer_count():
    for layers in range(1, 61):
        for depth in range(1, layers + 1):
            heads = default_prediction_layers(layers, depth)
            assert len(heads) == depth and heads[-1] == layers - 1 and heads[0] >= 0
            assert all(low < high for low, high in zip(heads, heads[1:]))


def test_more_codes_than_layers_are_refused():
    with pytest.raises(ValueError, match="`prediction_layers`"):
        DnDConfig(num_hidden_layers=3, code_depth=4)


def test_parallel_heads_all_stand_at_the_last_layer():
    config = DnDConfig(num_hidden_layers=3, code_depth=4, depth_mode="parallel")
    assert config.prediction_layers == [2, 2, 2, 2]


def test_keywords_override_a_size():
    config = DnDConfig.from_size("B", code_depth=4, grid_size=(4, 16), num_hidden_layers=6, rope_theta=100.0)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (6, 768, 12)
    assert config.grid_size == [4, 16] and config.sequence_length == 64 and config.rope_theta == 100.0


def test_a_number_as_grid_size_is_a_square():
    assert DnDConfig(grid_size=5).grid_size == [5, 5]


def test_null_class_exists_where_classes_are_dropped(make_config):
    assert make_config().has_null_class and not make_config(class_dropout_prob=0.0).has_null_class


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        dict(code_depth=3, prediction_layers=[0, 1, 2], grid_size=[3, 5], tie_prediction_heads=True),
        dict(depth_mode="parallel", num_key_value_heads=1, class_dropout_prob=0.0, drop_path_rate=0.2),
        dict(id2label={0: "a", 1: "b, c", 2: "d", 3: "e"}, rope_theta=500.0),
    ],
)
def test_json_keeps_everything(overrides, make_config, tmp_path):
    config = make_config(**overrides)
    config.save_pretrained(tmp_path)
    loaded = DnDConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    for name, value in overrides.items():
        assert getattr(loaded, name) == value
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "dnd"
    assert DnDConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_names_of_classes_have_integer_keys_after_loading(make_config, tmp_path):
    make_config(id2label={0: "a", 1: "b", 2: "c", 3: "d"}).save_pretrained(tmp_path)
    assert DnDConfig.from_pretrained(tmp_path).id2label == {0: "a", 1: "b", 2: "c", 3: "d"}


def test_auto_classes_know_the_model(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DnDConfig
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is DnDForImageGeneration
    assert torch.equal(loaded.embed_tokens.weight, model.embed_tokens.weight)


def test_num_labels_is_another_name_of_num_classes(make_config, tmp_path):
    config = DnDConfig(num_labels=7)
    assert config.num_classes == config.num_labels == len(config.id2label) == 7
    assert DnDConfig(num_labels=7, num_classes=7).num_classes == 7
    assert DnDConfig(id2label={0: "a", 1: "b"}).num_classes == 2
    config = make_config(id2label={0: "a", 1: "b", 2: "c", 3: "d"})
    config.save_pretrained(tmp_path)
    for name in ("num_labels", "num_classes"):  # the names belong to the classes that are replaced
        loaded = DnDConfig.from_pretrained(tmp_path, **{name: 7})
        assert loaded.num_classes == loaded.num_labels == 7 and loaded.id2label[6] == "LABEL_6"
    assert AutoConfig.from_pretrained(tmp_path, num_labels=4).num_classes == 4


def test_overrides_of_a_stored_configuration_are_checked_as_arguments_are(make_config, tmp_path):
    make_config().save_pretrained(tmp_path)
    loaded = DnDConfig.from_pretrained(tmp_path, hidden_size=32, grid_size=5)
    assert loaded.head_dim == 16 and loaded.grid_size == [5, 5]
    with pytest.raises(ValueError, match="`mlp_dropout`"):
        DnDConfig.from_pretrained(tmp_path, mlp_dropout=2.0)
    with pytest.raises(ValueError, match="`code_depth`"):  # the stored prediction layers are two
        DnDConfig.from_pretrained(tmp_path, code_depth=3)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"rope_theta": float("nan")}))
    with pytest.raises(ValueError, match="`rope_theta`"):
        DnDConfig.from_pretrained(tmp_path)


def test_integers_of_numpy_become_python_s(make_config):
    config = make_config(code_depth=np.int64(2), grid_size=np.int32(4), prediction_layers=[np.int64(0), np.int64(2)])
    assert config.grid_size == [4, 4] and config.prediction_layers == [0, 2]
    assert DnDConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()
