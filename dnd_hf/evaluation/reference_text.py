"""How much of the texts of pages stands in a reference text: their words, and their sequences of words."""

from collections.abc import Iterable, Sequence
from itertools import chain


PUNCTUATION = "!\"'(),-.:;?[]‘’“”—"
"""What is stripped from both ends of a word before it is compared; inside a word it stays."""


def words_of(text: str) -> list[str]:
    """The words of a text: between spaces and line ends, without punctuation around them; upper case stays."""
    return [word for piece in text.split() if (word := piece.strip(PUNCTUATION))]


def sequences_of(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    """All runs of `length` consecutive words, in order; [] where there are fewer words."""
    return list(zip(*(words[start:] for start in range(length))))


class ReferenceText:
    """What a text holds: its words, and its sequences of consecutive words.

    Args:
        texts: the text, in pieces (such as books) that no sequence goes across.

    Raises:
        ValueError: no words.
    """

    def __init__(self, texts: Iterable[str]):
        self.pieces = [words_of(text) for text in texts]
        self.vocabulary = frozenset(chain.from_iterable(self.pieces))
        if not self.vocabulary:
            raise ValueError("`texts` has no words.")
        self._sequences: dict[int, frozenset[tuple[str, ...]]] = {}

    def sequences(self, length: int) -> frozenset[tuple[str, ...]]:
        """The distinct sequences of `length` consecutive words, at least 1."""
        if length < 1:
            raise ValueError(f"`length` must be positive, got {length}.")
        if length not in self._sequences:
            found = chain.from_iterable(sequences_of(words, length) for words in self.pieces)
            self._sequences[length] = frozenset(found)
        return self._sequences[length]


def compare_with_reference(pages: Sequence[str], reference: ReferenceText, lengths: Sequence[int] = (5, 8)) -> dict:
    """Measures the texts of pages against a reference text, in which upper case and lower case differ.

    Args:
        pages: one text a page, at least one.
        reference: usually the training text.
        lengths: of the sequences of words, each at least 1.

    Returns:
        `num_pages`, `num_words`; `vocabulary_rate`, the share of words that are words of the reference; for each n of
        `lengths`, `in_reference_<n>`: the share of the pages' sequences of n words, each occurrence counted and none
        going across pages, that stand in the reference; `distinct_words`, how many, and `distinct_pages`, the share of
        pages whose words no earlier page has. Shares are in [0, 1], nan where there is nothing to count.

    Raises:
        ValueError: no pages, or a length below 1.
    """
    if not pages:
        raise ValueError("`pages` is empty.")
    words = [words_of(page) for page in pages]
    every_word = list(chain.from_iterable(words))
    report = {
        "num_pages": len(pages),
        "num_words": len(every_word),
        "vocabulary_rate": _share(every_word, reference.vocabulary),
    }
    for length in lengths:
        known = reference.sequences(length)
        found = list(chain.from_iterable(sequences_of(page, length) for page in words))
        report[f"in_reference_{length}"] = _share(found, known)
    return report | {
        "distinct_words": len(set(every_word)),
        "distinct_pages": len({tuple(page) for page in words}) / len(pages),
    }


def _share(items: Sequence, known: frozenset) -> float:
    return sum(item in known for item in items) / len(items) if items else float("nan")
