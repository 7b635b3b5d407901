"""Prompts: text to the tokens that a text-conditional transformer reads."""

from collections.abc import Sequence

from diffusers.utils import logging
from torch import Tensor
from transformers import PreTrainedTokenizerBase


logger = logging.get_logger(__name__)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase | None, prompt: str | Sequence[str], prompt_length: int) -> Tensor:
    """`(prompts, prompt_length)` int64: shorter prompts are padded, longer ones cut, with a warning.

    Args:
        tokenizer: of the pipeline, if it has one.
        prompt: one or several.
        prompt_length: tokens that the transformer reads; 0: none.

    Raises:
        ValueError: the model reads no text, the pipeline has no tokenizer, or a prompt is none.
    """
    if not prompt_length:
        raise ValueError("`prompt` must be None: this model has class labels.")
    if tokenizer is None:
        raise ValueError("`prompt` needs a pipeline with a `tokenizer`; without, give token ids as `class_labels`.")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"`prompt` must be text, one or several, got {prompt!r}.")
    tokens, cut = padded_tokens(tokenizer, prompts, prompt_length)
    for one, lost in cut.items():
        logger.warning(f"The prompt {one!r} is longer than {prompt_length} tokens: {lost!r} is cut off.")
    return tokens


def padded_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> tuple[Tensor, dict[str, str]]:
    """Tokens `(texts, length)`, int64, and, for each text that is longer, what of it is cut off."""
    cut = {
        text: tokenizer.decode(tokens[length:])
        for text, tokens in zip(texts, tokenizer(list(texts)).input_ids)
        if len(tokens) > length
    }
    options = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tokenizer(list(texts), **options).input_ids, cut
