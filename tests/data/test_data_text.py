"""dnd_hf.data.text: images show exactly the words beside them, inside the margin, and no boxes for missing glyphs."""

import json
import textwrap
import unicodedata

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fontTools.subset import Subsetter
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from dnd_hf.data.image_shards import Note
from dnd_hf.data.text import Face, TextImages, font_path, load_texts, split_words


PROSE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a"
    " wife. “Äh, ÅNGSTRÖM & Ñandú?” fjord, jiffy, (AVATAR) [Quijote] Öffnung — 1,234.50 € “if you like”, he said; f! f?"
    " jjj fff. However little known the feelings or views of such a man may be on his first entering a neighbourhood."
)


def make(text: str, note: Note | None = None, source: int = 0, **options) -> list[dict]:
    return list(TextImages(**options).rows([(source, text)], note or Note()))


@pytest.fixture(scope="module")
def abc_font(tmp_path_factory) -> str:
    """DejaVu Sans with the letters a, b and c alone."""
    font = TTFont(font_path("DejaVuSans"))
    subsetter = Subsetter()
    subsetter.populate(text="abc ")
    subsetter.subset(font)
    path = tmp_path_factory.mktemp("fonts") / "abc.ttf"
    font.save(path)
    return str(path)


def test_in_a_monospaced_face_images_are_the_lines_of_textwrap_as_pillow_draws_them():
    rows = make(PROSE, fonts=["DejaVuSansMono"], image_size=[200, 300], font_size=20, margin=10, line_spacing=1.5)
    font = ImageFont.truetype(str(font_path("DejaVuSansMono")), 20, layout_engine=ImageFont.Layout.BASIC)
    height = sum(font.getmetrics())
    lines = textwrap.wrap(PROSE, int(280 / font.getlength("x")), break_on_hyphens=False)
    per_image = int((180 - height) / (1.5 * height)) + 1
    assert per_image > 2 and len(rows) == -(-len(lines) // per_image) > 2
    for number, row in enumerate(rows):
        shown = lines[number * per_image : (number + 1) * per_image]
        expected = Image.new("L", (300, 200), "white")
        for place, line in enumerate(shown):
            ImageDraw.Draw(expected).text((10, 10 + int(place * 1.5 * height)), line, "black", font)
        assert row["text"] == " ".join(shown)
        assert np.array_equal(row["image"], expected)


@pytest.mark.parametrize(
    "face", ["DejaVuSans", "DejaVuSerif-BoldItalic", "DejaVuSansMono-Oblique", "STIXGeneralItalic"]
)
def test_ink_stays_inside_the_margin_and_the_texts_are_the_prose_word_for_word(face):
    for font_size, margin in ((32, 20), (17, 0)):
        note = Note()
        rows = make(PROSE, note, fonts=[face], image_size=[180, 331], font_size=font_size, margin=margin)
        assert " ".join(row["text"] for row in rows) == PROSE and not note.left_out
        for row in rows:
            ink = 255 - np.array(row["image"], dtype=int)
            assert ink.shape == (180, 331) and ink.max() == 255
            assert ink.sum() == ink[margin : 180 - margin, margin : 331 - margin].sum()
    # Nothing is cut off either: without a margin, there is as much ink as anywhere else.
    images = TextImages([face], [180, 331], 17, 0)
    line = PROSE.split()[-1]
    alone = Image.new("L", (400, 100), "white")
    ImageDraw.Draw(alone).text((50, 50), line, "black", Face(face, 17).font)
    assert (255 - np.array(images.draw([line], Face(face, 17)), dtype=int)).sum() == (
        255 - np.array(alone, dtype=int)
    ).sum()


def test_without_one_of_its_words_an_image_is_another():
    images, face = TextImages(), Face("DejaVuSerif", 32)
    words = PROSE.split()[:40]
    whole = images.draw(images.wrap(words, face), face)
    for missing in range(40):
        rest = words[:missing] + words[missing + 1 :]
        assert not np.array_equal(images.draw(images.wrap(rest, face), face), whole)


def test_images_have_at_most_max_words_and_shorter_ones_than_min_words_are_counted():
    note = Note()
    rows = make("a " * 25, note, max_words=10, min_words=6)
    assert [row["text"] for row in rows] == [" ".join("a" * 10)] * 2
    assert note.left_out == {"images of too few words": 1}
    assert len(make("a " * 1000, max_words=300)) > 4  # there is room for fewer


def test_an_image_depends_on_its_seed_and_source_alone():
    images = TextImages(image_size=128)
    items = [(source, PROSE) for source in range(8)]

    def rows(images, items):
        return [(row["source"], row["text"], row["image"].tobytes()) for row in images.rows(items, Note())]

    assert rows(images, items) == [row for item in items for row in rows(images, [item])]
    assert rows(images, items) != rows(TextImages(image_size=128, seed=1), items)
    assert len({row["font"] for row in images.rows(items, Note())}) == 3


def test_words_that_a_font_lacks_are_drawn_in_another_one(abc_font):
    for seed in range(5):
        rows = make("abc cab dig bac", fonts=[abc_font, "DejaVuSans"], seed=seed)
        fonts = {word: row["font"] for row in rows for word in row["text"].split()}
        assert list(fonts) == ["abc", "cab", "dig", "bac"] and fonts["dig"] == "DejaVuSans.ttf"
        if rows[0]["font"] == "abc.ttf":
            assert rows[0]["text"] == "abc cab"


def test_words_that_no_font_has_are_left_out_and_counted_and_no_image_goes_across_them(abc_font):
    note = Note()
    assert [row["text"] for row in make("abc dig cab bad", note, fonts=[abc_font])] == ["abc", "cab"]
    assert note.left_out == {"words that no font shows": 2}
    note = Note()
    assert not make(" \n ", note, fonts=[abc_font]) and note.left_out == {"empty texts": 1}


def test_a_word_larger_than_a_line_is_left_out_and_counted():
    note = Note()
    rows = make(f"one two {'w' * 40} three Ẳ four", note, fonts=["DejaVuSans"], image_size=256)
    assert [row["text"] for row in rows] == ["one two", "three", "four"]  # the accents of Ẳ reach above the line
    assert note.left_out == {"words larger than a line": 2}


def test_with_a_line_height_the_letters_of_a_monospaced_face_fill_cells_exactly():
    options = {"fonts": ["DejaVuSansMono"], "image_size": 128, "font_size": 13, "margin": 0, "line_height": 16}
    prose = PROSE.replace("Ä", "A").replace("ÅNGSTRÖM", "angstrom").replace("Ñ", "N").replace("Öff", "Off")
    rows = make(prose, **options)
    assert " ".join(row["text"] for row in rows).split() == [word for word in prose.split() if len(word) <= 16]
    font = Face("DejaVuSansMono", 13).font
    for row in rows:
        lines, canvas = textwrap.wrap(row["text"], 16, break_on_hyphens=False), Image.new("L", (128, 128), "white")
        assert len(lines) <= 8
        for y, line in enumerate(lines):
            for x, letter in enumerate(line):
                cell = Image.new("L", (8, 16), "white")
                ImageDraw.Draw(cell).text((0, 0), letter, "black", font)
                canvas.paste(cell, (8 * x, 16 * y))
        assert np.array_equal(row["image"], canvas)


def test_a_word_with_ink_beyond_the_line_height_is_left_out():
    note = Note()
    rows = make("on my own", note, fonts=["DejaVuSansMono"], image_size=128, font_size=13, margin=0, line_height=14)
    assert [row["text"] for row in rows] == ["on", "own"] and note.left_out == {"words larger than a line": 1}


def test_a_text_gives_its_first_max_images_images():
    texts = [row["text"] for row in make(PROSE, image_size=128, font_size=13)]
    assert len(texts) > 2
    assert [row["text"] for row in make(PROSE, image_size=128, font_size=13, max_images=2)] == texts[:2]


@pytest.mark.parametrize("character", ["\u0301", "א", "س", "\ue000", "漢", "\u200b"])
def test_marks_right_to_left_scripts_and_missing_or_invisible_characters_cannot_be_shown(character):
    face = Face("DejaVuSans", 16)
    assert face.shows("é") and not face.shows(f"e{character}")


def test_words_are_composed_and_have_no_invisible_characters():
    decomposed = unicodedata.normalize("NFD", "Ångström")
    assert split_words(f"{decomposed}\u00a0soft\u00adhyphen \ufeffok\n") == ["Ångström", "softhyphen", "ok"]


def test_a_damaged_font_is_refused(tmp_path):
    whole = font_path("DejaVuSans").read_bytes()
    for size in (0, 10, 300, 20_000):
        (tmp_path / "cut.ttf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.ttf is no font that can be used"):
            Face(str(tmp_path / "cut.ttf"), 16)


def damage(path, tag: str, first: int, last: int) -> str:
    """DejaVuSans with these bytes of one of its tables overwritten."""
    whole = bytearray(font_path("DejaVuSans").read_bytes())
    with TTFont(font_path("DejaVuSans")) as font:
        start = font.reader.tables[tag].offset
    whole[start + first : start + last] = b"\xff" * (last - first)
    path.write_bytes(whole)
    return str(path)


def test_a_font_whose_glyphs_are_damaged_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cut\.ttf is damaged: none of its first 200 characters can be drawn"):
        Face(damage(tmp_path / "cut.ttf", "glyf", 0, 100_000), 16)


def test_words_with_a_damaged_glyph_are_left_out_and_counted(tmp_path):
    with TTFont(font_path("DejaVuSans")) as font:
        start, end = font["loca"][font.getGlyphID("a")], font["loca"][font.getGlyphID("a") + 1]
    note, name = Note(), damage(tmp_path / "holes.ttf", "glyf", start, end)
    rows = list(TextImages([name]).rows([(0, "the words have holes, not all")], note))
    assert [row["text"] for row in rows] == ["the words", "holes, not"]
    assert note.left_out == {"words that no font shows": 2}


def test_a_word_longer_than_pillow_measures_is_left_out_and_counted():
    note = Note()
    rows = list(TextImages().rows([(0, "one " + "x" * 1_000_001 + " two")], note))
    assert [row["text"] for row in rows] == ["one", "two"] and note.left_out == {"words larger than a line": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fonts": []}, "`fonts` must name at least one"),
        ({"fonts": ["nowhere.ttf"]}, "nowhere.ttf is no font that can be used"),
        ({"fonts": [__file__]}, "test_data_text.py is no font that can be used"),
        ({"fonts": ["NoSuchFace"]}, "NoSuchFace is no font that can be used"),
        ({"image_size": [1, 2, 3]}, r"`image_size` must be one whole number or \(height, width\)"),
        ({"image_size": 60}, r"no room for a line of 38 pixels \(DejaVuSans\) inside a margin of 20"),
        ({"image_size": [512, 40]}, "no room for a line"),
        ({"font_size": 0}, "`font_size` must be positive, got 0"),
        ({"max_words": 0}, "`max_words` must be positive, got 0"),
        ({"min_words": 0}, "`min_words` must be positive, got 0"),
        ({"min_words": 9, "max_words": 8}, "`min_words` must not exceed `max_words`, got 9 and 8"),
        ({"margin": -1}, "`margin` must not be negative, got -1"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
        ({"line_height": 0}, "`line_height` must be positive, got 0"),
        ({"max_images": 0}, "`max_images` must be positive, got 0"),
        ({"image_size": [39, 512], "margin": 0, "line_height": 40}, "no room for a line of 40 pixels"),
        ({"line_spacing": 0.9}, "`line_spacing` must be at least 1, got 0.9"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextImages(**options)


@pytest.mark.parametrize("name", ["LICENCE", "notes.md", "LIC*"])
def test_files_of_any_other_name_are_text(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for file in ("LICENCE", "notes.md"):
        (tmp_path / file).write_text("one\n\ntwo\n")
    assert [text.strip() for _, text in load_texts(str(tmp_path / name))] == ["one", "two"]


def test_texts_that_are_not_there_are_said_to_be_neither_here_nor_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/book cannot be opened: .*/book does not exist, and "):
        load_texts(str(tmp_path / "book"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_is_no_text_is_refused(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "book").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"book cannot be read: 'utf-8' codec can't decode"):
        load_texts(str(tmp_path / "book"), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_come_from_files_of_any_kind_in_their_order(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = ["one\nline", None, "three", ""]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"n": 1, "prose": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"prose": texts}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        found = load_texts(str(tmp_path / name), column="prose", streaming=streaming)
        assert list(found) == [(0, "one\nline"), (1, ""), (2, "three"), (3, "")]
    (tmp_path / "c.txt").write_text("one\nline\n\nthree\n")
    name = str(tmp_path / "*.txt")
    assert [text.strip() for _, text in load_texts(name, streaming=streaming)] == ["one\nline", "three"]
    lines = load_texts(name, streaming=streaming, sample_by="line", num_texts=2)
    assert list(lines) == [(0, "one"), (1, "line")]


def test_sources_without_texts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"number": 1}\n')
    for options, message in [
        ({}, "has no column 'text'; it has \\['number'\\]"),
        ({"column": "number"}, "holds no texts but int"),
        ({"num_texts": 0}, "`num_texts` must be positive, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_texts(str(path), streaming=True, **options)
    (tmp_path / "b.txt").touch()
    with pytest.raises(ValueError, match="has no texts in 'train'"):
        load_texts(str(tmp_path / "b.txt"), streaming=True)
