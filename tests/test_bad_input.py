"""Proves that bad input is refused by a ValueError that names the argument, before anything is computed."""

import json
from types import SimpleNamespace

import pytest
import torch

from dnd_hf import RQVAE, DnDConfig, DnDPipeline


NAN, INF = float("nan"), float("inf")
LABELS, CODES = torch.tensor([0, 1]), torch.zeros(2, 2, 3, 2, dtype=torch.long)
IMAGES = torch.zeros(1, 3, 4, 6)


@pytest.fixture
def world(make_config, make_model, make_vae, make_pipeline, tmp_path):
    """The tiny objects of a case, and a list of the parts of them that ran."""
    pipe = make_pipeline()
    unguided, ran = make_model(class_dropout_prob=0.0), []
    for model in (pipe.transformer, unguided, pipe.vqvae):
        for part in list(model.modules())[1:]:
            part.register_forward_pre_hook(lambda part, _: ran.append(type(part).__name__))
    return SimpleNamespace(
        config=make_config,
        make_model=make_model,
        make_vae=make_vae,
        model=pipe.transformer,
        unguided=unguided,
        unguided_pipe=DnDPipeline(transformer=unguided, vqvae=pipe.vqvae),
        vae=pipe.vqvae,
        pipe=pipe,
        folder=tmp_path,
        generator=torch.Generator().manual_seed(0),
        ran=ran,
    )


def config(**overrides):
    return lambda world: world.config(**overrides)


def generate(class_labels=LABELS, **overrides):
    return lambda world: world.model.generate(class_labels, **{"generator": world.generator, **overrides})


def pipe(class_labels=(0, 1), **overrides):
    return lambda world: world.pipe(class_labels, **{"generator": world.generator, **overrides})


def forward(class_labels=LABELS, codes=CODES, **overrides):
    return lambda world: world.model(class_labels, codes, **overrides)


def encode(images):
    return lambda world: world.vae.encode(images)


def decode(codes=CODES, **overrides):
    return lambda world: world.vae.decode_codes(codes, **overrides)


def vae(**overrides):
    return lambda world: world.make_vae(**overrides)


def load_other_pipeline(world):
    (world.folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    DnDPipeline.from_pretrained(world.folder)


def load_file(world):
    file = world.folder / "weights.safetensors"
    file.touch()
    DnDPipeline.from_pretrained(file)


def pair(transformer=None, vqvae=None):
    def make(world):
        return DnDPipeline(transformer=world.make_model(**transformer or {}), vqvae=world.make_vae(**vqvae or {}))

    return make


CASES = [  # (the argument that the message must name, what else it must say, the call)
    # configuration
    ("size", "XXXL", lambda world: DnDConfig.from_size("S")),
    ("size", "'b'", lambda world: DnDConfig.from_size("b")),
    ("vocab_size", "0", config(vocab_size=0)),
    ("hidden_size", "multiple of 4", config(hidden_size=12)),
    ("hidden_size", "17", config(hidden_size=17)),
    ("num_hidden_layers", "0", config(num_hidden_layers=0)),
    ("num_attention_heads", "0", config(num_attention_heads=0)),
    ("num_key_value_heads", "3", config(num_key_value_heads=3)),
    ("num_key_value_heads", "0", config(num_key_value_heads=0)),
    ("num_key_value_heads", "-1", config(num_key_value_heads=-1)),
    ("num_classes", "0", config(num_classes=0, id2label=None)),
    ("code_depth", "0", config(code_depth=0)),
    ("grid_size", "got 0", config(grid_size=(0, 3))),
    ("grid_size", "(1, 2, 3)", config(grid_size=(1, 2, 3))),
    ("grid_size", "-2", config(grid_size=-2)),
    ("depth_mode", "vertical", config(depth_mode="diagonal")),
    ("prediction_layers", "increasing", config(prediction_layers=[2, 1])),
    ("prediction_layers", "increasing", config(prediction_layers=[1, 1])),
    ("prediction_layers", "[0, 3)", config(prediction_layers=[1, 3])),
    ("prediction_layers", "[0, 3)", config(prediction_layers=[-1, 2])),
    ("prediction_layers", "code_depth", config(prediction_layers=[2])),
    ("prediction_layers", "code_depth", config(prediction_layers=[0, 1, 2])),
    ("class_dropout_prob", "[0, 1)", config(class_dropout_prob=1.0)),
    ("embedding_dropout", "-0.1", config(embedding_dropout=-0.1)),
    ("residual_dropout", "[0, 1)", config(residual_dropout=1.5)),
    ("mlp_dropout", "nan", config(mlp_dropout=NAN)),
    ("attention_dropout", "[0, 1)", config(attention_dropout=1.0)),
    ("drop_path_rate", "[0, 1)", config(drop_path_rate=2.0)),
    ("id2label", "4 classes", config(id2label={0: "only one"})),
    ("id2label", "0 to 3", config(id2label={0: "a", 1: "b", 2: "c", 4: "d"})),
    ("num_labels", "`num_classes` (4)", config(num_labels=5)),
    ("vocab_size", "True", config(vocab_size=True)),
    ("vocab_size", "16777217", config(vocab_size=2**24 + 1)),
    ("hidden_size", "16.0", config(hidden_size=16.0)),
    ("hidden_size", "nan", config(hidden_size=NAN, intermediate_size=None)),
    ("num_hidden_layers", "1000000000", config(num_hidden_layers=10**9)),
    ("num_hidden_layers", "2.5", config(num_hidden_layers=2.5)),
    ("num_classes", "1000000000", config(num_classes=10**9)),
    ("code_depth", "'2'", config(code_depth="2")),
    ("intermediate_size", "0", config(intermediate_size=0)),
    ("grid_size", "2.5", config(grid_size=(2.5, 3))),
    ("grid_size", "True", config(grid_size=True)),
    ("grid_size", "nan", config(grid_size=NAN)),
    ("grid_size", "1000000", config(grid_size=(1, 10**6))),
    ("head_dim", "(8)", config(head_dim=4)),
    ("prediction_layers", "1.5", config(prediction_layers=[1.5, 2])),
    ("prediction_layers", "True", config(prediction_layers=[True, 2])),
    ("prediction_layers", "list", config(prediction_layers=2)),
    ("class_dropout_prob", "False", config(class_dropout_prob=False)),
    ("rope_theta", "0.0", config(rope_theta=0.0)),
    ("rope_theta", "inf", config(rope_theta=INF)),
    ("rms_norm_eps", "-1e-05", config(rms_norm_eps=-1e-5)),
    ("initializer_range", "nan", config(initializer_range=NAN)),
    ("id2label", "dict", config(id2label=["a", "b", "c", "d"])),
    ("hidden_act", "[]", config(hidden_act=[])),
    ("hidden_act", "'swish2'", config(hidden_act="swish2")),
    ("tie_prediction_heads", "1", config(tie_prediction_heads=1)),
    ("tie_word_embeddings", "tie_prediction_heads", config(tie_word_embeddings=True)),
    # forward
    ("codes", "(2, 3, 2, 2)", forward(codes=CODES.transpose(1, 2))),
    ("codes", "(batch, 2, 3, 2)", forward(codes=CODES.flatten(1, 2))),
    ("codes", "(2, 2, 3, 3)", forward(codes=torch.zeros(2, 2, 3, 3, dtype=torch.long))),
    ("class_labels", "(2,)", forward(class_labels=torch.tensor([0]))),
    ("class_labels", "(2, 1)", forward(class_labels=LABELS[:, None])),
    ("class_labels", "tensor", forward(class_labels=[0, 1])),
    ("class_labels", "torch.float32", forward(class_labels=LABELS.float())),
    ("class_labels", "torch.bool", forward(class_labels=LABELS.bool())),
    ("class_labels", "[0, 5), got 0 to 5", forward(class_labels=torch.tensor([0, 5]))),  # 4 is the null class
    ("class_labels", "[0, 4), got 0 to 4", lambda world: world.unguided(torch.tensor([0, 4]), CODES)),
    ("codes", "torch.float32", forward(codes=CODES.float())),
    ("codes", "tensor", forward(codes=CODES.tolist())),
    ("codes", "[0, 11), got 11 to 11", forward(codes=CODES + 11)),
    ("codes", "[0, 11), got -1 to -1", forward(codes=CODES - 1)),
    ("labels", "shape of `codes`", forward(labels=CODES[:1])),
    ("labels", "torch.float32", forward(labels=CODES.float())),
    ("labels", "[0, 11) or be -100, got 11 to 11", forward(labels=CODES + 11)),
    ("labels", "[0, 11) or be -100, got -1 to -1", forward(labels=CODES - 1)),
    ("output_attentions", "eager", forward(output_attentions=True)),
    # generate
    ("class_labels", "[0, 4)", generate([0, 4])),  # 4 is the null class
    ("class_labels", "-1", generate(torch.tensor([-1, 0]))),
    ("class_labels", "integers", generate([0.5, 1.0])),
    ("class_labels", "integers", generate(torch.tensor([True, False]))),
    ("class_labels", "non-empty", generate([])),
    ("class_labels", "list", generate([[0, 1]])),
    ("guidance_scale", "null class", lambda world: world.unguided.generate(LABELS, guidance_scale=1.5)),
    ("guidance_scale", "-1", generate(guidance_scale=-1.0)),
    ("guidance_scale", "nan", generate(guidance_scale=NAN)),
    ("guidance_scale", "inf", generate(guidance_scale=INF)),
    ("guidance_scale", "'2'", generate(guidance_scale="2")),
    ("guidance_schedule", "'cosine'", generate(guidance_schedule="cosine")),
    ("guidance_power", "0.0", generate(guidance_schedule="power-cosine", guidance_power=0.0)),
    ("temperature", "greater than 0", generate(temperature=0)),
    ("temperature", "-0.5", generate(temperature=-0.5)),
    ("temperature", "nan", generate(temperature=NAN)),
    ("temperature", "inf", generate(temperature=INF)),
    ("temperature", "0.0", generate(temperature=[1.0, 0.0])),
    ("temperature", "one per depth (2)", generate(temperature=[1.0])),
    ("temperature", "one per depth (2)", generate(temperature=(1.0, 1.0, 1.0))),
    ("top_k", "-1", generate(top_k=-1)),
    ("top_k", "2.5", generate(top_k=2.5)),
    ("top_k", "nan", generate(top_k=NAN)),
    ("top_k", "True", generate(top_k=True)),
    ("top_k", "one per depth (2)", generate(top_k=[1, 2, 3])),
    ("top_p", "(0, 1]", generate(top_p=0.0)),
    ("top_p", "1.01", generate(top_p=1.01)),
    ("top_p", "-0.5", generate(top_p=[0.5, -0.5])),
    ("top_p", "nan", generate(top_p=NAN)),
    ("top_p", "one per depth (2)", generate(top_p=[0.5])),
    ("generator", "(2)", generate(generator=[torch.Generator()])),
    ("generator", "(2)", generate(generator=[torch.Generator()] * 3)),
    ("generator", "(2)", generate(generator=[])),
    # pipeline
    ("class_labels", "[0, 4)", pipe(4)),
    ("class_labels", "-1", pipe([0, -1])),
    ("class_labels", "1.5", pipe([0, 1.5])),
    ("class_labels", "True", pipe([0, True])),
    ("class_labels", "1.0", pipe(1.0)),
    ("class_labels", "names or integers", pipe([])),
    ("class_labels", "4 classes", pipe(None)),
    ("class_labels", "'tenhc': did you mean 'tench'", pipe("tenhc")),
    ("class_labels", "'tiger shark'", pipe(["tench", "tigershark"])),
    ("class_labels", "great white shark", pipe("qqqqqq")),
    ("class_labels", "did you mean 'goldfish'", lambda world: world.pipe.get_label_ids(["goldfich"])),
    ("num_images_per_label", "0", pipe(num_images_per_label=0)),
    ("num_images_per_label", "1.5", pipe(num_images_per_label=1.5)),
    ("output_type", "'jpeg'", pipe(output_type="jpeg")),
    ("generator", "(4)", pipe(num_images_per_label=2, generator=[torch.Generator()] * 2)),
    ("guidance_scale", "null class", lambda world: world.unguided_pipe(0, guidance_scale=2.0)),
    ("temperature", "greater than 0", pipe(temperature=0.0)),
    ("top_k", "one per depth (2)", pipe(top_k=[3])),
    ("top_p", "(0, 1]", pipe(top_p=2)),
    ("positions_per_pass", "0", pipe(positions_per_pass=0)),
    ("positions_per_pass", "'all'", pipe(positions_per_pass="all")),
    ("transformer", "`num_vq_embeddings` 12", pair(vqvae=dict(num_vq_embeddings=12))),
    ("vqvae", "`vocab_size` 10", pair(transformer=dict(vocab_size=10))),
    ("vqvae", "`code_depth` 3", pair(vqvae=dict(code_depth=3))),
    ("pretrained_model_name_or_path", "model_index.json", lambda world: DnDPipeline.from_pretrained(world.folder)),
    ("pretrained_model_name_or_path", "DiTPipeline", load_other_pipeline),
    ("pretrained_model_name_or_path", "weights.safetensors", load_file),
    # tokenizer
    ("images", "multiple of 2", encode(torch.zeros(1, 3, 5, 6))),
    ("images", "(1, 3, 4, 7)", encode(torch.zeros(1, 3, 4, 7))),
    ("images", "(1, 1, 4, 6)", encode(IMAGES[:, :1])),
    ("images", "(3, 4, 6)", encode(IMAGES[0])),
    ("images", "(1, 3, 0, 6)", encode(IMAGES[:, :, :0])),
    ("images", "multiple of 2", lambda world: world.vae(torch.zeros(1, 3, 5, 6))),
    ("codes", "(batch, height, width, 2)", decode(CODES[..., 0])),
    ("codes", "(2, 2, 3, 1)", decode(CODES[..., :1])),
    ("codes", "integers", decode(CODES.float())),
    ("codes", "integers", decode(CODES.bool())),
    ("codes", "0 to 11", decode(CODES.clone().index_put_((torch.tensor(0),) * 4, torch.tensor(11)))),
    ("codes", "[0, 11)", decode(CODES - 1)),
    ("depth", "at least 1", decode(depth=0)),
    ("depth", "at most 2", decode(depth=3)),
    ("down_block_types", "2", vae(down_block_types=("DownEncoderBlock2D",))),
    ("up_block_types", "3", vae(up_block_types=("UpDecoderBlock2D",) * 3)),
    ("block_out_channels", "norm_num_groups", vae(block_out_channels=(8, 10))),
    ("down_block_types", "'DownBlock2D'", vae(down_block_types=("DownBlock2D", "DownBlock2D"))),
    ("block_out_channels", "8.5", vae(block_out_channels=(8, 8.5))),
    ("block_out_channels", "got 0", vae(block_out_channels=())),
    ("ema_decay", "[0, 1)", vae(ema_decay=1.0)),
    ("ema_decay", "nan", vae(ema_decay=NAN)),
    ("code_depth", "0", vae(code_depth=0)),
    ("code_depth", "True", vae(code_depth=True)),
    ("num_vq_embeddings", "1000000000", vae(num_vq_embeddings=10**9)),
    ("layers_per_block", "1.5", vae(layers_per_block=1.5)),
    ("latent_channels", "-4", vae(latent_channels=-4)),
    ("vq_embed_dim", "0", vae(vq_embed_dim=0)),
    ("norm_num_groups", "0", vae(norm_num_groups=0)),
    ("sample_size", "(4, 6, 8)", vae(sample_size=(4, 6, 8))),
    ("sample_size", "2.5", vae(sample_size=2.5)),
    ("code_patch_size", "(rows, columns)", vae(code_patch_size=2)),
    ("commitment_weight", "-0.25", vae(commitment_weight=-0.25)),
    ("commitment_weight", "nan", vae(commitment_weight=NAN)),
    ("act_fn", "'tanhh'", vae(act_fn="tanhh")),
    ("shared_codebook", "'no'", vae(shared_codebook="no")),
    ("block_out_channels", "list", vae(block_out_channels=8)),
    ("down_block_types", "list", vae(down_block_types="DownEncoderBlock2D")),
    ("act_fn", "[]", vae(act_fn=[])),
    ("images", "(0, 3, 4, 6)", encode(IMAGES[:0])),
    ("latents", "(1, 3, 4, 6)", lambda world: world.vae.decode(IMAGES)),
    ("latents", "list", lambda world: world.vae.decode([0.0])),
    ("latents", "torch.int64", lambda world: world.vae.decode(torch.zeros(1, 4, 2, 3, dtype=torch.long))),
    ("codes", "(0, 2, 3, 2)", decode(CODES[:0])),
    ("depth", "'1'", decode(depth="1")),
    ("depth", "1.5", decode(depth=1.5)),
    ("images", "floating", encode(torch.zeros(1, 3, 4, 6, dtype=torch.uint8))),
    ("images", "tensor", encode([[0.0]])),
    ("block_out_channels", "129", lambda world: RQVAE(block_out_channels=(128, 129))),
]


@pytest.mark.parametrize(
    ("argument", "says", "call"), CASES, ids=[f"{i}-{name}-{says}" for i, (name, says, _) in enumerate(CASES)]
)
def test_bad_input_is_refused_by_name_before_anything_is_computed(argument, says, call, world):
    states = torch.get_rng_state(), world.generator.get_state()
    modes = world.model.training, world.vae.training
    try:
        with pytest.raises(ValueError) as refusal:
            call(world)
    finally:
        seeded = world.generator.get_state()
    message = str(refusal.value)
    assert f"`{argument}`" in message and says in message, message
    assert not world.ran
    assert torch.equal(seeded, states[1])
    assert modes == (world.model.training, world.vae.training)


def test_the_same_calls_with_good_input_are_not_refused(world):
    """The table proves something only if its defaults are good."""
    world.model(LABELS, CODES, labels=CODES)
    world.model.generate(LABELS, temperature=[1.0, 0.5], top_k=(2, 0), top_p=[0.5, 1.0], guidance_scale=0)
    world.pipe((0, 1), num_images_per_label=2, generator=[torch.Generator() for _ in range(4)])
    world.vae.decode_codes(CODES, depth=1)
    world.vae.encode(IMAGES)
    world.unguided.generate(LABELS, guidance_scale=1)
    assert world.ran
