"""PPL_OCR with engines and language models whose answers are known."""

import math
from collections.abc import Sequence

import pytest
from known_answers import Levels

from dnd_hf.evaluation.perplexity import TextScore, shuffle_words
from dnd_hf.evaluation.ppl_ocr import evaluate_ppl_ocr


def in_order(texts: Sequence[str]) -> list[TextScore]:
    """A language model that expects the alphabet: each letter that follows its predecessor costs ln 2, others ln 8."""
    pairs = [list(zip(text.split(), text.split()[1:])) for text in texts]
    costs = [[math.log(2) if ord(b) == ord(a) + 1 else math.log(8) for a, b in of_text] for of_text in pairs]
    return [TextScore(sum(of_text), len(of_text)) for of_text in costs]


def test_ppl_ocr_scores_what_is_read_and_the_same_words_shuffled():
    texts = ["a b\nc d e f g h", "i j  k l m n o p q"]
    found = evaluate_ppl_ocr(Levels(2), lambda images: [texts[images[0].getpixel((0, 0))[0]]], in_order, batch_size=1)
    assert found["ppl_ocr"] == pytest.approx(2) and found["num_tokens"] == 15 and found["num_images"] == 2
    shuffled = in_order([shuffle_words(text, i) for i, text in enumerate(texts)])
    assert found["shuffled_ppl_ocr"] == pytest.approx(math.exp(sum(score.nll for score in shuffled) / 15))
    assert found["shuffled_ppl_ocr"] > 3
    assert found["texts"][0] == {
        "index": 0,
        "text": "a b c d e f g h",
        "nll": pytest.approx(7 * math.log(2)),
        "num_tokens": 7,
    }


def test_images_without_a_text_to_score_are_listed_and_left_out():
    texts = {0: "a b", 1: "", 2: "z", 3: None, 4: "b c"}

    def engine(images):
        text = texts[images[0].getpixel((0, 0))[0]]
        if text is None:
            raise RuntimeError("out of ink")
        return [text]

    found = evaluate_ppl_ocr(Levels(6, broken=[5]), engine, in_order)
    assert found["num_images"] == 2 and found["ppl_ocr"] == pytest.approx(2)
    reasons = {failure.index: failure.reason for failure in found["failures"]}
    assert reasons.keys() == {1, 2, 3, 5}
    assert "no readable text" in reasons[1] and "too short" in reasons[2] and "out of ink" in reasons[3]
    nothing = evaluate_ppl_ocr(Levels(2), lambda images: [" "], in_order)
    assert nothing["num_images"] == 0 and nothing["ppl_ocr"] is None and len(nothing["failures"]) == 2
