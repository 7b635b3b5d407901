"""Prompts: pipelines of an RQ-Transformer that reads text, with and without a tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from dnd_hf import DnDPipeline
from dnd_hf.conversion import convert_prompt_tokenizer
from dnd_hf.pipelines import prompts
from dnd_hf.pipelines.modular import DnDModularPipeline


WORDS = ["a", "red", "blue", "house"]
VOCAB = ["[PAD]", "[UNK]", *(f"{word}</w>" for word in WORDS)]


@pytest.fixture
def tokenizer(tmp_path):
    """Reads the words of `WORDS`, letter by letter merged, as ids 2 to 5."""
    letters = sorted({letter for word in WORDS for letter in word} | {f"{word[-1]}</w>" for word in WORDS})
    tokens, merges = [*VOCAB], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens.append(parts[0])
    tokens = list(dict.fromkeys([*tokens, *letters]))
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return convert_prompt_tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt", 4)


@pytest.fixture
def pipe(make_rq_model, make_vae, tokenizer):
    vae = make_vae()
    model = make_rq_model(prompt_length=4, prompt_vocab_size=len(tokenizer), code_depth=2, code_vector_size=4)
    model.set_code_vectors(vae.quantizer.codebooks)
    pipe = DnDPipeline(model, vae, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_prompt_is_what_its_tokens_are(pipe):
    tokens = torch.tensor([[2, 3, 5, 0], [2, 4, 5, 0]])
    expected = pipe.transformer.generate(tokens, generator=[0, 1])
    for prompt in (["a red house", "A blue HOUSE"], ("a red house", "a blue house")):
        codes = pipe(prompt=prompt, generator=[0, 1], output_type="codes").images
        assert torch.equal(codes, expected)
    assert torch.equal(pipe(tokens, generator=[0, 1], output_type="codes").images, expected)
    (image,) = pipe(prompt="a red house").images
    assert image.size == (6, 4)


def test_images_of_one_prompt_stand_side_by_side(pipe):
    codes = pipe(
        prompt=["a red house", "a"], num_images_per_label=2, generator=[0, 1, 2, 3], output_type="codes"
    ).images
    tokens = torch.tensor([[2, 3, 5, 0]] * 2 + [[2, 0, 0, 0]] * 2)
    assert torch.equal(codes, pipe.transformer.generate(tokens, generator=[0, 1, 2, 3]))


def test_what_is_cut_off_is_said(pipe, monkeypatch):
    said = []
    monkeypatch.setattr(prompts.logger, "warning", said.append)
    codes = pipe(prompt="a red red house house", generator=0, output_type="codes").images
    assert torch.equal(codes, pipe.transformer.generate([[2, 3, 3, 5]], generator=0))
    (message,) = said
    assert "longer than 4 tokens" in message and "'house' is cut off" in message


@pytest.mark.parametrize("load", [DnDPipeline.from_pretrained, DiffusionPipeline.from_pretrained])
def test_a_saved_pipeline_keeps_its_tokenizer(load, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    options = {} if load == DnDPipeline.from_pretrained else {"trust_remote_code": True}
    loaded = load(tmp_path / "saved", **options)
    loaded.set_progress_bar_config(disable=True)
    expected = pipe(prompt="a blue house", generator=0, output_type="codes").images
    assert torch.equal(loaded(prompt="a blue house", generator=0, output_type="codes").images, expected)
    loaded.save_pretrained(tmp_path / "again")
    names = [
        {str(file.relative_to(folder)) for file in folder.rglob("*")}
        for folder in map(Path, (tmp_path / "saved", tmp_path / "again"))
    ]
    assert names[0] == names[1]


def test_the_blocks_of_a_saved_pipeline_read_prompts_too(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    blocks = DnDModularPipeline.from_pretrained(str(tmp_path))
    blocks.load_components()
    options = dict(prompt=["a red house", "blue"], generator=[0, 1], output_type="codes")
    assert torch.equal(blocks(output="images", **options), pipe(**options).images)


def test_without_a_tokenizer_token_ids_are_taken_and_prompts_refused(pipe, tmp_path):
    DnDPipeline(pipe.transformer, pipe.vqvae).save_pretrained(tmp_path)
    without = DnDPipeline.from_pretrained(tmp_path)
    without.set_progress_bar_config(disable=True)
    assert without.tokenizer is None
    tokens = [[2, 3, 5, 0]]
    expected = pipe(prompt="a red house", generator=0, output_type="codes").images
    assert torch.equal(without(tokens, generator=0, output_type="codes").images, expected)
    with pytest.raises(ValueError, match="`prompt` needs a pipeline with a `tokenizer`"):
        without(prompt="a red house")
    shared = DnDPipeline.from_pipe(pipe)
    assert shared.tokenizer is pipe.tokenizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "`prompt` must be given"),
        (dict(prompt=[]), "`prompt` must be text"),
        (dict(prompt=["a", 3]), "`prompt` must be text"),
        (dict(prompt="a", class_labels=[[2, 3, 5, 0]]), "must not both be given"),
        (dict(class_labels=[0]), "`class_labels` must be text tokens"),
    ],
)
def test_what_is_no_prompt_is_refused(arguments, message, pipe):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_a_model_with_classes_takes_no_prompt(make_pipeline):
    with pytest.raises(ValueError, match="`prompt` must be None: this model has class labels"):
        make_pipeline()(prompt="a red house")
