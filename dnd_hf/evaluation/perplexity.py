"""PPL_OCR: how likely a language model finds the text that is read from pictures (arXiv 2410.01912, Section 4.4)."""

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from dnd_hf.data.images import to_images

from .images import Failure, read_batches
from .ocr import OCREngine, try_to_read


class TextScore(NamedTuple):
    """Negative log-likelihood of a text, nats, and the number of tokens that it sums over."""

    nll: float
    num_tokens: int


class LanguageModel:
    """Any causal language model of transformers, as a judge of texts.

    A text begins with the tokenizer's begin-of-text token where it has one; otherwise its first token only conditions
    the rest. Texts longer than `max_length` are read in windows that share one token, so every token is scored once.

    Args:
        model: folder or Hub id.
        device: where it runs; its weights keep their dtype, the likelihoods are float32.
        max_length: tokens read at once, at least 2; the model's own limit, and no more than this.

    Call with one text; returns its [`TextScore`], with 0 tokens for a text too short to score.

    Raises:
        ValueError: transformers can not load such a model; `max_length` below 2.
    """

    def __init__(self, model: str, device: str | torch.device = "cpu", max_length: int = 2048):
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; it must be at least 2")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{model!r} is no causal language model that transformers can load: {error}") from error
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(max_length, limit or max_length)

    @torch.inference_mode()
    def __call__(self, text: str) -> TextScore:
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if self.tokenizer.bos_token_id is not None:
            tokens = [self.tokenizer.bos_token_id, *tokens]
        nll = 0.0
        for start in range(0, len(tokens) - 1, self.max_length - 1):
            window = torch.tensor([tokens[start : start + self.max_length]], device=self.model.device)
            logits = self.model(window).logits[0, :-1].float()
            nll += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        return TextScore(nll, max(0, len(tokens) - 1))


def perplexity(scores: Sequence[TextScore]) -> float:
    """`exp(sum of nll / sum of tokens)`: every token of all texts counts the same. ValueError without a token."""
    tokens = sum(score.num_tokens for score in scores)
    if not tokens:
        raise ValueError("there is no text to score")
    return math.exp(sum(score.nll for score in scores) / tokens)


def shuffle_words(text: str, seed: int) -> str:
    """The words of a text in an order drawn with `seed`, joined by single spaces."""
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)


def evaluate_ppl_ocr(
    dataset: Dataset,
    engine: OCREngine,
    language_model: Callable[[str], TextScore],
    seed: int = 0,
    batch_size: int = 16,
    num_workers: int = 0,
) -> dict:
    """Reads pictures and scores their texts, and as a control the same texts with their words shuffled.

    Args:
        dataset: items as of an `ImageDataset`.
        engine: reads the pictures.
        language_model: a [`LanguageModel`], or any function from a text to its [`TextScore`].
        seed: of the shuffling.
        batch_size: pictures read from `dataset` at once, at least 1.
        num_workers: processes that read the data set.

    Returns:
        `num_images` whose text is scored; `ppl_ocr` and `shuffled_ppl_ocr` ([`perplexity`]), None where that is 0;
        `num_tokens`, those of `ppl_ocr`; `texts`, a dict a picture: `index`, `text`, `nll`, `num_tokens`; `failures`, a
        list of `Failure`: the pictures that are broken, that the engine failed at, or without readable text. They have
        no part in the figures.

    Raises:
        ValueError: every picture is broken.
    """
    texts, scores, shuffled, failures = [], [], [], []
    for indices, images, _ in read_batches(dataset, batch_size, failures, num_workers, "OCR"):
        for index, image in zip(indices, to_images(images), strict=True):
            text, reason = try_to_read(engine, image)
            if text:
                texts.append({"index": index, "text": text})
            else:
                failures.append(Failure(index, "OCR", reason or "there is no readable text"))
    for text in tqdm(texts, desc="Perplexity", unit=" texts"):
        score = language_model(text["text"])
        text |= score._asdict()
        if score.num_tokens:
            scores.append(score)
            shuffled.append(language_model(shuffle_words(text["text"], seed + text["index"])))
        else:
            failures.append(Failure(text["index"], "perplexity", f"the text {text['text']!r} is too short"))
    return {
        "num_images": len(scores),
        "num_tokens": sum(score.num_tokens for score in scores),
        "ppl_ocr": perplexity(scores) if scores else None,
        "shuffled_ppl_ocr": perplexity(shuffled) if scores else None,
        "texts": texts,
        "failures": failures,
    }
