"""How likely a language model finds a text: the perplexity of texts, and the same texts in another order."""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available


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
        gguf_file: name of a GGUF file in it, whose weights and tokenizer are taken; needs the package `gguf`.
        device: where it runs; its weights keep their dtype, the likelihoods are float32.
        max_length: tokens read at once, at least 2; the model's own limit, and no more than this.

    Call with one text; returns its [`TextScore`], with 0 tokens for a text too short to score.

    Raises:
        ImportError: `gguf_file` without the package `gguf`.
        ValueError: transformers cannot load such a model; `max_length` below 2.
    """

    def __init__(
        self,
        model: str,
        device: str | torch.device = "cpu",
        max_length: int = 2048,
        gguf_file: str | None = None,
    ):
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; it must be at least 2")
        if gguf_file is not None and not is_gguf_available():
            raise ImportError("a GGUF file needs the package gguf: pip install gguf")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, gguf_file=gguf_file)
            self.model = AutoModelForCausalLM.from_pretrained(model, gguf_file=gguf_file, dtype="auto")
            self.model.to(device).eval()
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
