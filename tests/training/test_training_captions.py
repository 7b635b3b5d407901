"""dnd_hf.training.captions: captions become tokens of one length, and what is cut off is said."""

import logging

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from dnd_hf.pipelines.prompts import prompt_tokens
from dnd_hf.training.captions import CollateCaptions, PromptTokenizer


VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "a": 2, "red": 3, "house": 4}


def make_tokenizer(**options) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 3, **options}
    )


def collate(items: list[dict]) -> dict:
    return {"labels": torch.zeros(len(items)), "captions": [item["caption"] for item in items], "other": 7}


def test_the_labels_of_a_batch_are_the_padded_tokens_that_the_pipeline_makes_of_the_same_prompts(caplog):
    prompts = PromptTokenizer(make_tokenizer(), 3)
    texts = ["a red house", "house", "a blue"]
    with caplog.at_level(logging.WARNING):
        batch = CollateCaptions(collate, prompts)([{"caption": text} for text in texts])
    assert batch.keys() == {"labels", "other"} and batch["other"] == 7 and not caplog.records
    assert batch["labels"].tolist() == [[2, 3, 4], [4, 0, 0], [2, 1, 0]]
    assert torch.equal(batch["labels"], prompt_tokens(prompts.tokenizer, texts, 3))


def test_the_first_caption_that_is_cut_is_reported_once(caplog):
    collated = CollateCaptions(collate, PromptTokenizer(make_tokenizer(), 2))
    for _ in range(3):
        assert collated([{"caption": "a"}, {"caption": "a red house"}])["labels"].tolist() == [[2, 0], [2, 3]]
    (record,) = caplog.records
    assert "longer than 2 tokens" in record.getMessage() and "'house' is lost" in record.getMessage()


def test_the_length_is_that_of_the_tokenizer_unless_it_is_given(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    assert PromptTokenizer.from_pretrained(tmp_path).prompt_length == 3
    assert PromptTokenizer.from_pretrained(tmp_path, 5).prompt_length == 5
    assert PromptTokenizer.from_pretrained(tmp_path).vocab_size == 5


def test_what_cannot_pad_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`text_tokenizer` has no padding token"):
        PromptTokenizer(make_tokenizer(pad_token=None), 3)
    with pytest.raises(ValueError, match="`prompt_length` must be at least 2"):
        PromptTokenizer(make_tokenizer(), 1)
    make_tokenizer(model_max_length=10**30).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`prompt_length` is needed"):
        PromptTokenizer.from_pretrained(tmp_path)


def test_the_fingerprint_tells_vocabularies_apart_and_not_what_was_done_with_them():
    prompts = PromptTokenizer(make_tokenizer(), 3)
    before = prompts.fingerprint
    CollateCaptions(collate, prompts)([{"caption": "a red house"}])
    assert prompts.fingerprint == before == PromptTokenizer(make_tokenizer(), 3).fingerprint
    other = make_tokenizer()
    other.add_tokens(["blue"])
    assert PromptTokenizer(other, 3).fingerprint != before and PromptTokenizer(other, 3).vocab_size == 6
    assert PromptTokenizer(make_tokenizer(padding_side="left"), 3).fingerprint != before
