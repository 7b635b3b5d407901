"""Captions: the text tokens that a text-conditional transformer is trained on in the place of class labels."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..ops.number_checks import whole_number
from ..pipelines.prompts import padded_tokens


logger = logging.getLogger(__name__)

LONGEST_PROMPT = 2**12
"""A tokenizer's `model_max_length` beyond this says that it has no limit."""


@dataclass
class PromptTokenizer:
    """A text tokenizer and the length that captions are padded or cut to.

    Args:
        tokenizer: with a padding token.
        prompt_length: tokens of a caption, at least 2.

    Raises:
        ValueError: a tokenizer that is not fast or has no padding token, or a length out of its range.
    """

    tokenizer: PreTrainedTokenizerFast
    prompt_length: int

    def __post_init__(self):
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"`text_tokenizer` must be a fast tokenizer, got {type(tokenizer).__name__}.")
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "`text_tokenizer` has no padding token: set its `pad_token`, its `eos_token` for example, and save it."
            )
        self.prompt_length = whole_number("prompt_length", self.prompt_length, 2, LONGEST_PROMPT)

    @classmethod
    def from_pretrained(cls, name: str, prompt_length: int | None = None) -> "PromptTokenizer":
        """The tokenizer of a folder or of an id on the Hub; `prompt_length=None`: its `model_max_length`."""
        tokenizer = AutoTokenizer.from_pretrained(name)
        if prompt_length is None:
            prompt_length = tokenizer.model_max_length
            if prompt_length > LONGEST_PROMPT:
                raise ValueError("`prompt_length` is needed: `text_tokenizer` has no `model_max_length`.")
        return cls(tokenizer, prompt_length)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def fingerprint(self) -> str:
        """A hash of what the tokens of a text depend on."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}  # of a call
        sides = [self.tokenizer.padding_side, self.tokenizer.truncation_side, self.tokenizer.pad_token]
        return hashlib.sha256(json.dumps([state, sides], sort_keys=True).encode()).hexdigest()


class CollateCaptions:
    """Makes batches whose `labels` are the tokens `(batch, prompt_length)`, int64, of the `captions` of the items.

    The first caption that is longer than that is reported, by each process that makes batches; all are cut.

    Args:
        collate: makes batches with `captions`.
        prompts: the tokenizer.
    """

    def __init__(self, collate: Callable[[list[dict]], dict[str, Any]], prompts: PromptTokenizer):
        self.collate, self.prompts, self.reported = collate, prompts, False

    def __call__(self, items: list[dict]) -> dict[str, Any]:
        batch = self.collate(items)
        length = self.prompts.prompt_length
        tokens, cut = padded_tokens(self.prompts.tokenizer, batch.pop("captions"), length)
        if cut and not self.reported:
            self.reported = True
            (caption, lost), *_ = cut.items()
            logger.warning("Captions longer than %d tokens are cut; of %r, %r is lost.", length, caption, lost)
        return batch | {"labels": tokens}
