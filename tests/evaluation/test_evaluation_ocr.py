"""The OCR engine on pictures whose text is known, and the exact measure on cases worked by hand."""

import sys

import pytest
from PIL import Image

from dnd_hf.data.words import WORDS, WordImages
from dnd_hf.evaluation.ocr import RapidOCR, exact_match


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("rapidocr_onnxruntime")
    return RapidOCR()


def test_real_words_are_read_exactly_in_at_least_93_percent(engine):
    items = [WordImages(300, seed=1_000_000)[i] for i in range(300)]
    texts = engine([item["image"] for item in items])
    assert exact_match(texts, [WORDS[item["label"]] for item in items]) >= 0.93


def test_a_picture_is_read_the_same_alone_and_in_any_mode(engine):
    images = [WordImages(5)[i]["image"] for i in range(5)]
    texts = engine(images)
    assert [engine([image])[0] for image in images] == texts
    assert engine([image.convert("RGBA") for image in images]) == texts


def test_red_reaches_the_engine_as_red(engine, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "_engine", lambda pixels, **_: (seen.append(pixels) or [["", 0.0]], [0.0]))
    engine([Image.new("RGB", (64, 32), (255, 0, 0))])
    assert seen[0][0, 0].tolist() == [0, 0, 255]  # BGR


def test_an_empty_picture_has_an_empty_text_and_no_picture_no_text(engine):
    assert engine([Image.new("RGB", (128, 32), (200, 200, 200))]) == [""]
    assert engine([]) == []


def test_fewer_than_one_thread_is_refused():
    with pytest.raises(ValueError, match="num_threads is 0; it must be at least 1"):
        RapidOCR(num_threads=0)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ImportError, match=r'pip install "dnd-hf\[ocr\]"'):
        RapidOCR()


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
