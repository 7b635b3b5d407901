"""How likely a language model finds a text: the perplexity of texts, and the same texts in another order."""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
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

    Call with a sequence of texts; returns the [`TextScore`] of each, with 0 tokens for a text too short to score. Short
    texts are read together, no more than `max_length` tokens at once, which changes nothing but rounding.

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

    def __call__(self, texts: Sequence[str]) -> list[TextScore]:
        windows = [(number, window) for number, text in enumerate(texts) for window in self._windows(text)]
        windows.sort(key=lambda window: len(window[1]), reverse=True)
        nlls, num_tokens = [0.0] * len(texts), [0] * len(texts)
        while windows:
            size = max(1, self.max_length // len(windows[0][1]))
            batch, windows = windows[:size], windows[size:]
            for (number, window), nll in zip(batch, self._nlls([window for _, window in batch]), strict=True):
                nlls[number] += nll
                num_tokens[number] += len(window) - 1
        return [TextScore(*score) for score in zip(nlls, num_tokens, strict=True)]

    def _windows(self, text: str) -> list[list[int]]:
        """The tokens of a text in windows of at most `max_length`; each begins with the last one of that before."""
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if self.tokenizer.bos_token_id is not None:
            tokens = [self.tokenizer.bos_token_id, *tokens]
        step = self.max_length - 1
        return [tokens[start : start + self.max_length] for start in range(0, len(tokens) - 1, step)]

    @torch.inference_mode()
    def _nlls(self, windows: list[list[int]]) -> list[float]:
        """Of each window, the negative log-likelihood of all its tokens but the first."""
        padded = pad_sequence([torch.tensor(window) for window in windows], batch_first=True).to(self.model.device)
        lengths = torch.tensor([len(window) for window in windows], device=padded.device)
        kept = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        logits = self.model(padded, attention_mask=kept.long()).logits[:, :-1].float()
        nlls = F.cross_entropy(logits.transpose(1, 2), padded[:, 1:], reduction="none")
        return nlls.where(kept[:, 1:], 0).sum(1).tolist()


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
