"""From captions to `pipe(prompt=...)`: extraction keeps them, train.py learns from them and resumes exactly."""

import runpy
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from dnd_hf import RQVAE, DnDPipeline
from dnd_hf.command_line import parse_arguments
from dnd_hf.data.codes import CodesDataset
from dnd_hf.data.words import WORDS
from dnd_hf.training.metrics import read_metrics


EXAMPLES = Path(__file__).parents[2] / "examples"
LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer of images, and one of letters."""
    folder = tmp_path_factory.mktemp("captions")
    torch.manual_seed(0)
    RQVAE(
        sample_size=(16, 64), block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=8,
        num_vq_embeddings=16, code_depth=2,
    ).save_pretrained(folder / "vqvae")  # fmt: skip
    letters = ["[PAD]", "[UNK]", *sorted({letter for word in WORDS for letter in word})]
    backend = Tokenizer(WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=LENGTH
    ).save_pretrained(folder / "letters")
    return folder


def run(name: str, **options) -> None:
    """Runs a script in this process, as if in one of its own."""
    words = [word for option, value in options.items() for word in (f"--{option}", *str(value).split())]
    script = runpy.run_path(str(EXAMPLES / name))
    arguments = {"train.py": "DnDArguments", "extract_codes.py": "ExtractionArguments"}[name]
    script["main"](parse_arguments(script[arguments], words))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train(folder: Path, name: str, **options) -> Path:
    run(
        "train.py",
        **{
            **dict(architecture="rq_transformer", text_tokenizer=folder / "letters", hidden_size=16),
            **dict(num_hidden_layers=1, num_depth_layers=1, num_attention_heads=2, train_batch_size=4),
            **dict(max_train_steps=4, checkpointing_steps=2, validation_steps=4, logging_steps=1),
            **dict(num_validation_images=6, num_samples=4, learning_rate=0.01, class_dropout_prob=0.2),
            **dict(dataloader_num_workers=0),
            **dict(output_dir=folder / name),
            **options,
        },
    )  # fmt: skip
    return folder / name


@pytest.fixture(scope="module")
def codes(folder) -> Path:
    run(
        "extract_codes.py", dataset_name="words", num_train_images=40, caption_column="text", vqvae=folder / "vqvae",
        with_mirror_image=True, output_dir=folder / "codes", dataloader_num_workers=0, shard_size=16, batch_size=8,
    )  # fmt: skip
    return folder / "codes"


@pytest.fixture(scope="module")
def trained(folder, codes) -> Path:
    return train(folder, "trained", codes_dir=codes)


def test_codes_keep_the_caption_of_their_image_in_each_crop(codes):
    rows = datasets.load_from_disk(str(codes))
    assert rows["caption"][:] == [WORDS[index] for index in rows["image_index"][:]] and len(rows) == 80
    dataset = CodesDataset(codes)
    assert [dataset[i]["caption"] for i in (0, 1, 79)] == [WORDS[0], WORDS[0], WORDS[39]]


def test_a_run_that_resumes_ends_with_the_weights_of_one_that_did_not_stop(folder, codes, trained):
    train(folder, "resumed", codes_dir=codes, max_train_steps=2)
    train(folder, "resumed", codes_dir=codes, resume_from_checkpoint="latest")
    one, other = (load_file(path / "transformer" / "model.safetensors") for path in (trained, folder / "resumed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = [
        [line["train/prompt_loss"] for line in read_metrics(path / "metrics.jsonl") if "train/prompt_loss" in line]
        for path in (trained, folder / "resumed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_the_loss_is_a_tenth_that_of_the_text(trained):
    for line in read_metrics(trained / "metrics.jsonl"):
        for part in {name.partition("/")[0] for name in line if "/" in name}:
            depths = (line[f"{part}/loss_depth_1"] + line[f"{part}/loss_depth_2"]) / 2
            expected = 0.9 * depths + 0.1 * line[f"{part}/prompt_loss"]
            assert line[f"{part}/loss"] == pytest.approx(expected, rel=1e-5)


def test_the_result_is_a_pipeline_of_prompts_and_samples_are_those_of_captions_held_out(trained):
    pipe = DnDPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config.prompt_length == LENGTH
    captions = (trained / "samples" / "captions.txt").read_text().splitlines()
    assert len(captions) == 4 and set(captions) <= set(WORDS)
    (image,) = pipe(prompt=captions[0]).images
    assert image.size == (64, 16)
    assert "samples/captions.txt" in (trained / "README.md").read_text()


def test_a_text_model_is_fine_tuned_on_images_with_captions_and_soft_targets(folder, trained):
    options = dict(
        dataset_name="words", num_train_images=40, caption_column="text", vqvae=folder / "vqvae",
        pretrained_transformer=trained / "transformer", soft_code_temperature=0.5, max_train_steps=2,
    )  # fmt: skip
    assert DnDPipeline.from_pretrained(train(folder, "tuned", **options)).tokenizer is not None
    with pytest.raises(ValueError, match="prompt_length was 8 and is 6"):
        train(folder, "other", **options, prompt_length=6)


def test_another_tokenizer_of_texts_is_no_resumption(folder, codes, trained):
    with pytest.raises(ValueError, match="prompt_length was None and is 9"):
        train(folder, "trained", codes_dir=codes, resume_from_checkpoint="latest", prompt_length=9)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "letters")
    tokenizer.add_tokens(["ß"])
    tokenizer.save_pretrained(folder / "else" / "letters")
    with pytest.raises(ValueError, match="text_tokens was"):
        train(
            folder, "trained", codes_dir=codes, resume_from_checkpoint="latest",
            text_tokenizer=folder / "else" / "letters",
        )  # fmt: skip


def test_codes_without_captions_and_options_that_do_not_fit_are_refused(folder, codes, capsys):
    run(
        "extract_codes.py", dataset_name="words", num_train_images=20, vqvae=folder / "vqvae",
        output_dir=folder / "plain", dataloader_num_workers=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="plain has no captions"):
        train(folder, "none", codes_dir=folder / "plain")
    for options, message in (
        (dict(codes_dir=codes, architecture="dnd"), "goes with --architecture rq_transformer"),
        (dict(codes_dir=codes, caption_column="text"), "--text_tokenizer needs --caption_column, or a --codes_dir"),
        (dict(dataset_name="words", vqvae=folder / "vqvae"), "--text_tokenizer needs --caption_column"),
    ):
        with pytest.raises(SystemExit):
            train(folder, "none", **options)
        assert message in capsys.readouterr().err
