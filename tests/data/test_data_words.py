"""Rendered words: what an image promises (size, contrast, room) and how the dataset numbers them."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageColor

from dnd_hf.data import words
from dnd_hf.data.words import BASELINES, FONT_FACES, INKS, PAPERS, WORDS, WordImages, render_word


LUMINANCE = (0.2126, 0.7152, 0.0722)


def colours_of(image):
    """Background (the corner, which no text touches) and the colour furthest from it: the text's own, or nearly."""
    pixels = np.asarray(image).astype(int).reshape(-1, 3)
    background = pixels[0]
    return background, pixels[np.abs(pixels - background).sum(axis=1).argmax()]


def test_there_are_100_distinct_sorted_words_of_4_or_5_capitals():
    assert len(WORDS) == len(set(WORDS)) == 100
    assert list(WORDS) == sorted(WORDS)
    assert all(4 <= len(word) <= 5 and word.isascii() and word.isalpha() and word.isupper() for word in WORDS)


def test_an_item_depends_on_seed_and_index_alone():
    forward = [WordImages(50, seed=3)[i]["image"].tobytes() for i in range(50)]
    dataset = WordImages(200, seed=3)
    backward = [dataset[i]["image"].tobytes() for i in reversed(range(50))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 50


def test_another_seed_gives_other_images():
    ones, others = WordImages(20, seed=0), WordImages(20, seed=1)
    assert all(ones[i]["image"].tobytes() != others[i]["image"].tobytes() for i in range(20))


def test_items_are_rgb_images_of_the_size_asked_for_with_an_int_label():
    item = WordImages(1, height=48, width=160)[0]
    assert isinstance(item["image"], Image.Image)
    assert (item["image"].mode, item["image"].size) == ("RGB", (160, 48))
    assert type(item["label"]) is int


def test_labels_go_round_so_that_classes_are_balanced():
    dataset = WordImages(300)
    labels = [dataset[i]["label"] for i in range(len(dataset))]
    assert labels == [i % 100 for i in range(300)]
    assert dataset.class_names == WORDS


def test_at_least_12_faces_are_listed_and_every_one_is_used(monkeypatch):
    used = []
    letter = words._letter
    monkeypatch.setattr(words, "_letter", lambda one, face, *sizes: used.append(face) or letter(one, face, *sizes))
    for i in range(400):
        render_word("ZEBRA", np.random.default_rng(i))
    assert len(FONT_FACES) >= 12
    assert set(used) == set(FONT_FACES)


def test_every_face_draws_the_same_word_differently():
    drawn = {tuple(words._letter(one, face, 64, 32)[0].tobytes() for one in "GHOST") for face in FONT_FACES}
    assert len(drawn) == len(FONT_FACES)


def inked(image):
    """Where an image is not of its background's colour, which is that of a corner."""
    pixels = np.asarray(image).astype(int)
    return np.abs(pixels - pixels[-1, 0]).sum(axis=-1)


@pytest.mark.parametrize(("height", "width"), [(32, 128), (16, 64), (64, 64), (40, 300)])
def test_text_fits_into_the_width(height, width):
    longest = sorted(WORDS, key=len)[-10:]
    for i in range(200):
        ink = inked(render_word(longest[i % 10], np.random.default_rng(i), height, width))
        assert ink.shape == (height, width)
        assert ink.any()
        assert ink[:, [0, -1]].max() < ink.max() / 2  # at 16 pixels the gap between letters is less than one


def test_the_lower_edge_cuts_off_no_more_than_the_end_of_a_tail(monkeypatch):
    """The same word, whole on the upper line and at the bottom of the image on the lower."""
    for word in WORDS:
        for seed in range(8):
            amounts = []
            for baseline in BASELINES:
                monkeypatch.setattr(words, "BASELINES", (baseline,))
                amounts.append(inked(render_word(word, np.random.default_rng(seed))).sum())
            assert amounts[1] > amounts[0] * (0.9 if set(word) & set("JQ") else 0.999)


def test_text_reaches_every_row_and_nearly_every_column():
    ink = sum(inked(render_word("HOUSE", np.random.default_rng(i))) for i in range(2000))
    assert ink.any(axis=1)[1:28].all()
    assert ink.any(axis=0)[2:-2].all()


def test_a_word_is_the_same_wherever_it_stands_and_stands_in_many_places(monkeypatch):
    """Moved by whole cells of 8 pixels, untilted words of one look agree to the pixel."""
    for name in ("FONT_FACES", "CAP_HEIGHTS", "TILTS", "INKS", "PAPERS"):
        monkeypatch.setattr(words, name, getattr(words, name)[:1])
    monkeypatch.setattr(words, "TILTS", (0.0,))
    places, cut_out = set(), set()
    for i in range(300):
        ink = inked(render_word("SNOW", np.random.default_rng(i)))
        top, left = ink.any(axis=1).argmax() // 8 * 8, ink.any(axis=0).argmax() // 8 * 8
        places.add((top, left))
        cut_out.add(np.roll(ink, (-top, -left), (0, 1)).tobytes())
    assert len(cut_out) == 1
    assert {top for top, _ in places} == {0, 8}
    assert len(places) >= 10


def test_every_ink_is_seen_on_every_paper():
    dataset, seen = WordImages(600), set()
    for i in range(600):
        paper, text = colours_of(dataset[i]["image"])
        (paper,) = (name for name in PAPERS if ImageColor.getrgb(name) == tuple(paper))
        ink = min(INKS, key=lambda name: np.abs(np.array(ImageColor.getrgb(name)) - text).sum())
        assert np.abs(np.array(ImageColor.getrgb(ink)) - text).max() < 40  # thin strokes are anti-aliased
        seen.add((ink, paper))
    assert len(seen) == len(INKS) * len(PAPERS)


def test_every_ink_stands_out_from_every_paper():
    def luminance(name):
        channels = np.array(ImageColor.getrgb(name)) / 255
        return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ LUMINANCE

    # The contrast that WCAG 2 asks of text at level AA.
    assert min((luminance(paper) + 0.05) / (luminance(ink) + 0.05) for ink in INKS for paper in PAPERS) > 4.5


def test_negative_indices_count_from_the_end_and_others_outside_are_errors():
    dataset = WordImages(7)
    assert dataset[-1]["image"].tobytes() == dataset[6]["image"].tobytes()
    assert dataset[-7]["label"] == 0
    for index in (7, -8):
        with pytest.raises(IndexError, match=r"\[-7, 7\)"):
            dataset[index]
    assert len(list(dataset)) == len(dataset) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images is 0; it must be at least 1"),
        ({"num_images": 1, "seed": -1}, "seed is -1; it must be at least 0"),
        ({"num_images": 1, "height": 15}, "height is 15; it must be at least 16"),
        ({"num_images": 1, "width": 63}, "width is 63; it must be at least 64"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        WordImages(**arguments)


def test_a_blank_word_is_refused():
    with pytest.raises(ValueError, match="word is ' '"):
        render_word(" ", np.random.default_rng(0))


def test_a_word_with_more_letters_than_there_is_room_for_is_refused():
    assert render_word("W" * 32, np.random.default_rng(0), 32, 64).size == (64, 32)
    with pytest.raises(ValueError, match="word has 33 letters; 64 pixels are too narrow for more than 32"):
        render_word("W" * 33, np.random.default_rng(0), 32, 64)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words._font.cache_clear()
    words._letter.cache_clear()
    with pytest.raises(ImportError, match=r'pip install "\.\[text\]"'):
        render_word("ZEBRA", np.random.default_rng(0))
