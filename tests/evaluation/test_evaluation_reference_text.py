"""dnd_hf.evaluation.reference_text: shares counted by hand, and what real, recited and shuffled pages score."""

import math

import numpy as np
import pytest

from dnd_hf.evaluation.reference_text import ReferenceText, compare_with_reference, words_of


BOOKS = ["In the beginning God created the heaven and the earth.", "And the earth was without form, and void;"]


def test_words_lose_the_punctuation_around_them_and_nothing_else():
    assert words_of("(And he\nsaid, Ben-hadad's:  -- LORD!)") == ["And", "he", "said", "Ben-hadad's", "LORD"]
    assert words_of(" \n --") == []


def test_shares_are_those_counted_by_hand():
    reference = ReferenceText(BOOKS)
    pages = ["God created the\nheaven, and God", "the eerth was without"]
    report = compare_with_reference(pages, reference, lengths=(1, 2, 3, 9))
    assert report["num_pages"] == 2 and report["num_words"] == 10 and report["distinct_words"] == 8
    assert report["vocabulary_rate"] == report["in_reference_1"] == 9 / 10  # all but "eerth"
    assert report["in_reference_2"] == (4 + 1) / (5 + 3)  # not "and God", "the eerth", "eerth was"
    assert report["in_reference_3"] == 3 / (4 + 2)
    assert math.isnan(report["in_reference_9"])


def test_a_recited_page_stands_in_the_text_whole_and_a_shuffled_one_does_not():
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in rng.integers(0, 300, 3000)]
    reference = ReferenceText([" ".join(words[:1500]), " ".join(words[1500:])])
    recited = [" ".join(words[start : start + 20]) for start in range(0, 1400, 100)]
    shuffled = [" ".join(rng.permutation(page.split())) for page in recited]
    assert compare_with_reference(recited, reference)["in_reference_8"] == 1
    report = compare_with_reference(shuffled, reference)
    assert report["vocabulary_rate"] == 1 and report["in_reference_5"] == 0


def test_no_sequence_goes_across_books_or_pages():
    reference = ReferenceText(BOOKS)
    assert compare_with_reference(["the earth And the"], reference, (3,))["in_reference_3"] == 0
    assert compare_with_reference(["the earth", "was without"], reference, (2,))["in_reference_2"] == 1
    assert math.isnan(compare_with_reference(["the earth", "was without"], reference, (3,))["in_reference_3"])


def test_upper_case_differs_from_lower_case():
    assert compare_with_reference(["GOD God god"], ReferenceText(BOOKS))["vocabulary_rate"] == 1 / 3


def test_a_page_that_repeats_an_earlier_one_is_not_distinct():
    assert compare_with_reference(["And the", "and the", "And\nthe,"], ReferenceText(BOOKS))["distinct_pages"] == 2 / 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReferenceText(["", "--"]), "`texts` has no words"),
        (lambda: compare_with_reference([], ReferenceText(BOOKS)), "`pages` is empty"),
        (lambda: compare_with_reference(["a"], ReferenceText(BOOKS), (0,)), "`length` must be positive, got 0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
