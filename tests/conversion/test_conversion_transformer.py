"""dnd_hf.conversion.transformer: converted transformers compute what the official code does (tests/fixtures)."""

import argparse

import pytest
import torch
from fixtures.official_cases import PARITY, parity_copy, write_case

from dnd_hf import convert_transformer
from dnd_hf.conversion.transformer import PAPER_SAMPLING


TRANSFORMERS = ("dnd_depth1", "dnd_depth3_tied", "dnd_depth4", "llamagen", "llamagen_heads_of_100")


@torch.no_grad()
@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_compute_what_the_official_code_does(case, tmp_path):
    path, description, _, expected = write_case(case, tmp_path)
    model = convert_transformer(path, **description["options"])
    config, labels = model.config, expected["class_labels"]
    codes = expected["codes"].view(2, *config.grid_size, config.code_depth)
    output = model(labels, codes, labels=codes)
    logits = output.logits.transpose(1, 2)
    torch.testing.assert_close(logits, expected["logits"].view(logits.shape), rtol=0, atol=1e-4)
    torch.testing.assert_close(output.loss, expected["loss"], rtol=0, atol=1e-6)
    greedy = model.generate(labels, guidance_scale=description["guidance_scale"], do_sample=False)
    assert torch.equal(greedy, expected["greedy_codes"].view(codes.shape).long())
    assert config.tie_prediction_heads == ("tied" in case)
    assert model.config.has_null_class == (case != "dnd_depth1")


@pytest.mark.parametrize(
    ("args", "options", "sides"),
    [
        ({"num_pred_heads": 3}, {}, ["2 (`output.*`)", "3 (`args.num_pred_heads`)"]),
        ({"vocab_size": 65}, {}, ["64 (`tok_embeddings.weight`)", "65 (`args.vocab_size`)"]),
        ({"num_classes": 12}, {}, ["12 classes", "got 11 rows"]),
        ({"class_dropout_prob": 0.0}, {}, ["10 classes", "dropout 0.0", "got 11 rows"]),
        ({"pred_head_positions": "0,1,2"}, {}, ["each of 2 `output.*`", "[0, 1, 2]"]),
        ({"share_prediction_heads": True}, {}, ["`output.*`", "`args.share_prediction_heads`"]),
        ({}, {"prediction_layers": [1]}, ["each of 2 `output.*`", "[1]"]),
        ({}, {"prediction_layers": [1, 3]}, ["[0, 3)", "[1, 3]"]),
        ({}, {"num_attention_heads": 3}, ["width of `tok_embeddings.weight`, 128", "3"]),
        ({}, {"num_classes": 4}, ["4 classes", "got 11 rows"]),
        ({"gpt_type": "t2i"}, {}, ["class-conditional", "text-conditional"]),
    ],
)
def test_a_contradiction_in_a_transformer_names_both_sides(args, options, sides, tmp_path):
    namespace = torch.load(PARITY / "transformer.pt", weights_only=False)["args"]
    folder = parity_copy(tmp_path, args=argparse.Namespace(**{**vars(namespace), **args}))
    with pytest.raises(ValueError) as error:
        convert_transformer(folder / "transformer.pt", **options)
    assert all(side in str(error.value) for side in sides), error.value


@pytest.mark.parametrize(("width", "depth", "classes"), [(3200, 1, 1000), (2048, 2, 1000), (1536, 8, 1)])
def test_published_sizes_get_their_heads_names_and_sampling_settings(width, depth, classes, tmp_path):
    layers = max(2, depth)
    weights = {
        "tok_embeddings.weight": (8, width),
        "cls_embedding.embedding_table.weight": (classes + (classes > 1), width),
        **{f"norm.{k}.weight": (width,) for k in range(depth)},
        **{f"output.{k}.weight": (8, width) for k in range(depth)},
    }
    for i in range(layers):
        rows = {"attention.wqkv": 3 * width, "attention.wo": width, "feed_forward.w1": 256, "feed_forward.w3": 256}
        weights |= {f"layers.{i}.{name}.weight": (count, width) for name, count in rows.items()}
        weights[f"layers.{i}.feed_forward.w2.weight"] = (width, 256)
        weights |= {f"layers.{i}.{name}.weight": (width,) for name in ("attention_norm", "ffn_norm")}
    tensors = {name: torch.ones(shape, dtype=torch.float16) for name, shape in weights.items()}
    torch.save(tensors, tmp_path / "checkpoint.pt")
    model = convert_transformer(
        tmp_path / "checkpoint.pt", grid_size=24, prediction_layers=range(layers - depth, layers), dtype=torch.bfloat16
    )
    assert model.config.num_attention_heads == (32 if width == 3200 else width // 64)
    assert model.config.num_classes == classes and model.dtype == torch.bfloat16
    for name, value in PAPER_SAMPLING[width, depth, classes].items():
        assert getattr(model.generation_config, name) == value
    if classes == 1000:
        assert model.config.id2label[0] == "tench, Tinca tinca" and model.config.id2label[999].startswith(
            "toilet tissue"
        )
    else:
        assert model.generation_config.guidance_scale == 1
