"""Metrics of texts, against plain implementations and cases worked by hand."""

import numpy as np
import pytest
from known_answers import distance

from dnd_hf.evaluation.text_metrics import compare_texts, exact_match


def common(a, b) -> int:
    """Length of the longest common subsequence, by its recurrence."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a, start=1):
        for j, y in enumerate(b, start=1):
            table[i, j] = table[i - 1, j - 1] + 1 if x == y else max(table[i - 1, j], table[i, j - 1])
    return table[-1, -1]


PAIRS = [
    ("the cat sat on the mat", "the cat sat on a mat"),
    ("Hello  wurld", "hello world"),
    ("entirely different", "no single word of it"),
    ("", "nothing was read"),
    ("42 is the answer, or 43", "the answer is 42"),
]


@pytest.mark.parametrize("pairs", [PAIRS[:1], PAIRS[1:], PAIRS])
def test_metrics_of_texts_are_those_of_plain_implementations(pairs):
    predictions, references = map(list, zip(*pairs))
    measures = compare_texts(predictions, references)
    words = [(a.split(), b.split()) for a, b in pairs]
    wrong = sum(distance(a, b) for a, b in words)
    assert measures["wer"] == pytest.approx(wrong / sum(len(b) for _, b in words))
    characters = sum(distance(a, b) for a, b in pairs)
    assert measures["cer"] == pytest.approx(characters / sum(len(b) for _, b in pairs))
    cleaned = [(a.lower().replace(",", "").split(), b.lower().split()) for a, b in pairs]
    rouge = [2 * common(a, b) / (len(a) + len(b)) for a, b in cleaned]
    assert measures["rouge_l"] == pytest.approx(np.mean(rouge))


def test_errors_are_counted_over_all_texts_together():
    measures = compare_texts(["ab cd", "x"], ["ab ce", "xyzw"])  # characters: 1 of 5 and 3 of 4; words: 1 of 2, 1 of 1
    assert measures["cer"] == pytest.approx(4 / 9) and measures["wer"] == pytest.approx(2 / 3)
    assert measures["rouge_l"] == pytest.approx(0.25) and measures["exact_match"] == 0


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [(["a"], ["a", "b"], "1 predictions and 2 references"), (["a", "b"], ["a", " "], "a reference is empty")],
)
def test_texts_that_cannot_be_compared_are_refused(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        compare_texts(predictions, references)


@pytest.mark.parametrize(
    ("predictions", "references", "share"),
    [
        (["a"], ["a"], 1.0),
        ([" zebra\n", "sun"], ["zebra", "sun "], 1.0),
        (["Zebra", "ze bra", "zebra", ""], ["zebra"] * 4, 0.25),
        (["river", "tiger"], ["tiger", "river"], 0.0),
    ],
)
def test_exact_match_counts_equal_texts_and_forgives_outer_whitespace_only(predictions, references, share):
    assert exact_match(predictions, references) == share


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_exact_match_refuses_texts_that_do_not_pair_up(predictions, references):
    with pytest.raises(ValueError, match=f"{len(predictions)} predictions and {len(references)} references"):
        exact_match(predictions, references)


def test_stemming_counts_words_of_one_stem_as_equal_for_rouge_only():
    predictions, references = ["foxes running"], ["fox runs away"]
    plain, stemmed = compare_texts(predictions, references), compare_texts(predictions, references, use_stemmer=True)
    # Two of two words match two of three: precision 1, recall 2/3.
    assert plain.pop("rouge_l") == 0 and stemmed.pop("rouge_l") == pytest.approx(0.8)
    assert plain == stemmed
