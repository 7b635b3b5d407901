"""examples/configs/: every file is read by its script, and builds the model that its name and the paper say."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from dnd_hf import RQVAE, DnDForImageGeneration, RQTransformerForImageGeneration
from dnd_hf.command_line import parse_arguments


EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "configs"

GRIDS = {  # rows, columns, depth, codebook size; arXiv 2410.01912, Sections 4 and 5
    "rqvae_imagenet_16x16x1": (16, 16, 1, 16384),
    "rqvae_imagenet_16x16x2": (16, 16, 2, 16384),
    "rqvae_imagenet_16x16x4": (16, 16, 4, 16384),
    "rqvae_imagenet_16x16x8": (16, 16, 8, 16384),
    "rqvae_imagenet_32x32x2": (32, 32, 2, 16384),
    "rqvae_text_image_24x24x1": (24, 24, 1, 4096),
    "rqvae_arxiv_image_16x16x8": (16, 16, 8, 16384),
    "words_rqvae": (4, 16, 4, 512),
}
TRANSFORMERS = {  # tokenizer, classes, billions of parameters with one head (Table 2), head layers
    "dnd_imagenet_xxl": ("rqvae_imagenet_16x16x2", 1000, 1.4, [39, 47]),
    "dnd_imagenet_xxxl": ("rqvae_imagenet_16x16x2", 1000, 2.5, [39, 47]),
    "dnd_text_image": ("rqvae_text_image_24x24x1", 1, 1.4, [47]),
    "dnd_arxiv_image": ("rqvae_arxiv_image_16x16x8", 1, 1.4, [26, 29, 32, 35, 38, 41, 44, 47]),
}


def read(name: str, script: str, arguments: str):
    """The arguments that `script` makes of a config; unknown or ill-typed options end the test."""
    return parse_arguments(
        runpy.run_path(str(EXAMPLES / script))[arguments], ["--config", str(CONFIGS / f"{name}.yaml")]
    )


def make_tokenizer(name: str) -> RQVAE:
    with torch.device("meta"):
        return read(name, "train_rqvae.py", "RQVAEArguments").make_vae()


def make_transformer(name: str, tokenizer: str, num_classes: int) -> DnDForImageGeneration:
    rows, columns, _, _ = GRIDS[tokenizer]
    args = read(name, "train.py", "DnDArguments")
    with torch.device("meta"):
        names = {i: str(i) for i in range(num_classes)}
        vae = make_tokenizer(tokenizer)
        return args.make_transformer(vae, grid_size=(rows, columns), num_classes=num_classes, id2label=names)


def test_every_config_is_tested():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {*GRIDS, *TRANSFORMERS, "words_codes", "words_dnd", "small_rqvae", "small_dnd"}


@pytest.mark.parametrize("name", GRIDS)
def test_a_tokenizer_has_the_grid_and_the_codebook_of_its_name(name):
    vae = make_tokenizer(name)
    codebook = vae.quantizer.codebook(0)
    assert (*vae.grid_size, vae.config.code_depth, len(codebook)) == GRIDS[name]
    if name != "words_rqvae":
        assert vae.config.block_out_channels == (128, 128, 256, 256, 512) and codebook.shape[1] == 256
        args = read(name, "train_rqvae.py", "RQVAEArguments")
        assert args.train_batch_size * args.gradient_accumulation_steps * 8 == 256


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_has_the_papers_size_and_heads(name):
    tokenizer, num_classes, billions, heads = TRANSFORMERS[name]
    model = make_transformer(name, tokenizer, num_classes)
    more_heads = sum(p.numel() for head in list(model.heads)[1:] for p in head.parameters())
    assert (model.num_parameters() - more_heads) / 1e9 == pytest.approx(billions, abs=0.05)
    assert model.config.prediction_layers == heads
    assert model.config.num_classes == num_classes and model.config.has_null_class == (num_classes > 1)


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    args = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args, *_ = _validate_launch_command(args)
    assert args.num_processes == config.num_processes
    assert args.use_fsdp == ("fsdp" in path.stem) and args.use_deepspeed == ("deepspeed" in path.stem)
    if args.use_deepspeed:  # where the precision is "auto", that of the script's options
        assert json.loads((EXAMPLES.parent / args.deepspeed_config_file).read_text())["bf16"] == {"enabled": "auto"}
    else:
        assert args.mixed_precision == "bf16"
    if args.use_fsdp:
        assert args.fsdp_transformer_layer_cls_to_wrap is None  # accelerate takes those of either model
        assert DnDForImageGeneration._no_split_modules and RQTransformerForImageGeneration._no_split_modules


def test_the_words_model_is_the_bundled_one():
    from dnd_hf import DnDPipeline, bundled_checkpoint

    bundled = DnDPipeline.from_pretrained(bundled_checkpoint("words"))
    vae, model = make_tokenizer("words_rqvae"), make_transformer("words_dnd", "words_rqvae", 100)
    for built, saved in ((vae, bundled.vqvae), (model, bundled.transformer)):
        shapes = {name: parameter.shape for name, parameter in saved.named_parameters()}
        assert {name: parameter.shape for name, parameter in built.named_parameters()} == shapes
    codes = read("words_codes", "extract_codes.py", "ExtractionArguments")
    assert codes.vqvae == read("words_rqvae", "train_rqvae.py", "RQVAEArguments").output_dir
    assert codes.output_dir == read("words_dnd", "train.py", "DnDArguments").codes_dir
