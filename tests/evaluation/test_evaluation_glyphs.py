"""dnd_hf.evaluation.glyphs: real pages are read without error, noisy ones by the nearest glyph, others are refused."""

import string

import numpy as np
import pytest
from PIL import Image

from dnd_hf.data.image_shards import Note
from dnd_hf.data.text import TextImages
from dnd_hf.evaluation.glyphs import GlyphReader


CHARACTERS = string.ascii_letters + string.digits + "!'(),-.:;?"


@pytest.fixture(scope="module")
def reader() -> GlyphReader:
    return GlyphReader(CHARACTERS)


def pages(num_words: int = 400, seed: int = 0) -> list[dict]:
    """Pages of random words of all characters."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list(CHARACTERS), rng.integers(1, 12))) for _ in range(num_words)]
    maker = TextImages(["DejaVuSansMono"], 128, 13, 0, line_height=16)
    return list(maker.rows([(0, " ".join(words))], Note()))


def test_real_pages_are_read_without_error(reader):
    rows = pages()
    assert len(rows) > 20
    texts = reader([row["image"] for row in rows])
    assert [" ".join(text.split()) for text in texts] == [row["text"] for row in rows]
    assert all(len(line) <= 16 for text in texts for line in text.split("\n"))
    assert {text.count("\n") for text in texts} == {7}
    assert reader.nearest([row["image"] for row in rows])[1].max() == 0


def test_colour_and_noise_below_half_the_distance_of_glyphs_change_nothing(reader):
    rows = pages()
    distances = np.linalg.norm(reader.glyphs[:, None] - reader.glyphs, axis=-1)
    # Noise of this length in each cell cannot bring another glyph nearer.
    limit = distances[distances > 0].min() / 2
    rng = np.random.default_rng(1)
    noisy = []
    for row in rows:
        noise = rng.normal(size=(8, 16, 16, 8))
        noise *= 0.9 * limit / np.linalg.norm(noise, axis=(1, 3), keepdims=True)
        noise = noise.reshape(128, 128)
        noisy.append(Image.fromarray((np.asarray(row["image"], float) + noise).clip(0, 255).round().astype(np.uint8)))
    texts = reader([image.convert("RGB") for image in noisy])
    assert [" ".join(text.split()) for text in texts] == [row["text"] for row in rows]
    assert reader.nearest(noisy)[1].max() > 0


def test_an_image_is_read_the_same_whatever_is_read_beside_it(reader):
    images = [row["image"] for row in pages()]
    assert reader(images) == [reader([image])[0] for image in images]
    assert reader([]) == []


def test_an_empty_page_has_empty_lines_and_a_line_its_spaces(reader):
    page = Image.new("L", (128, 128), 255)
    assert reader([page]) == ["\n" * 7]
    (row,) = TextImages(["DejaVuSansMono"], 128, 13, 0, line_height=16).rows([(0, "In a")], Note())
    page.paste(row["image"].crop((0, 0, 128, 16)), (16, 32))
    assert reader([page]) == ["\n\n  In a\n\n\n\n\n"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"characters": "ab漢"}, "`characters` has '漢', which DejaVuSansMono does not show"),
        ({"characters": "aim", "font": "DejaVuSans"}, "'i' of DejaVuSans at 13 pixels does not fill a cell"),
        ({"characters": "ag", "cell_size": (14, 8)}, r"'g' .* its ink ends at \(8, 16\)"),
    ],
)
def test_glyphs_that_do_not_fill_a_cell_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GlyphReader(**options)


def test_images_that_are_not_whole_cells_are_refused(reader):
    for sizes in ([(128, 120)], [(128, 128), (64, 128)]):
        with pytest.raises(ValueError, match="one size is needed, in cells of 16 x 8"):
            reader([Image.new("L", size) for size in sizes])
