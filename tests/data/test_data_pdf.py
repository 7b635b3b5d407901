"""dnd_hf.data.pdf: crops with the text of the glyphs inside them, from hand-written PDFs whose layout is known."""

import itertools
import os
from pathlib import Path

import numpy as np
import pypdfium2
import pytest

from dnd_hf.data.image_shards import Note
from dnd_hf.data.pdf import UNKNOWN, PdfCrops, text_inside


def write_pdf(
    path: Path,
    contents: list[str | None],
    box: str = "[0 0 400 300]",
    page: str = "",
    trailer: str = "",
    encoding: str = "/StandardEncoding",
) -> None:
    """A PDF in Helvetica (/F); each page has this content, box and further entries, or is missing (None)."""
    kids = " ".join(f"{10 + 2 * number} 0 R" for number in range(len(contents)))
    objects = {
        1: "<< /Type /Catalog /Pages 2 0 R >>",
        2: f"<< /Type /Pages /Kids [{kids}] /Count {len(contents)} >>",
        3: f"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding {encoding} >>",
    }
    for number, content in enumerate(contents):
        if content is not None:
            objects[10 + 2 * number] = (
                f"<< /Type /Page /Parent 2 0 R /MediaBox {box} /Contents {11 + 2 * number} 0 R"
                f" /Resources << /Font << /F 3 0 R >> >> {page} >>"
            )
            objects[11 + 2 * number] = f"<< /Length {len(content)} >> stream\n{content}\nendstream"
    text, places = "%PDF-1.4\n", {}
    for number, body in objects.items():
        places[number] = len(text)
        text += f"{number} 0 obj\n{body}\nendobj\n"
    start = len(text)
    text += "xref\n0 1\n0000000000 65535 f \n"
    text += "".join(f"{number} 1\n{place:010d} 00000 n \n" for number, place in places.items())
    path.write_text(f"{text}trailer << /Root 1 0 R /Size 99 {trailer} >>\nstartxref\n{start}\n%%EOF\n")


PLACES = itertools.product((30, 110, 190, 270, 350), (40, 110, 180, 250))
LETTERS = dict(zip("ABDEFGHKLMNPRSTUVXYZ", PLACES))
"""Where, in points from the lower left corner, each letter begins; they lie far apart, and look different."""

SCATTERED = " ".join(f"BT /F 20 Tf {x} {y} Td ({letter}) Tj ET" for letter, (x, y) in LETTERS.items())


@pytest.fixture
def folder(tmp_path) -> Path:
    write_pdf(tmp_path / "letters.pdf", [SCATTERED])
    return tmp_path


def crops(folder: Path, note: Note | None = None, **options) -> list[dict]:
    maker = PdfCrops(folder, **{"page_size": [600, 800], "crop_size": 200, "min_ink": 0.0, **options})
    return list(maker.rows(list(maker.pages()), note or Note()))


def ink_box(image: np.ndarray, letter: str) -> tuple[int, int, int, int]:
    """Left, top, right, bottom, in pixels, of the ink where a letter was written, at two pixels a point."""
    x, y = LETTERS[letter]
    left, top = 2 * x - 10, 600 - 2 * y - 60
    rows, columns = np.nonzero(image[top : top + 80, left : left + 70] < 128)
    assert len(rows) > 20
    return left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1


def test_a_crop_has_the_text_of_the_letters_whose_ink_lies_inside_it(folder):
    (page,) = crops(folder, crop_size=[600, 800], crops_per_page=1)
    assert sorted("".join(page["text"].split())) == sorted(LETTERS) and (page["left"], page["top"]) == (0, 0)
    image = np.array(page["image"].convert("L"))
    boxes = {letter: ink_box(image, letter) for letter in LETTERS}
    seen, cut = set(), 0
    for row in crops(folder, crops_per_page=300):
        left, top = row["left"], row["top"]
        assert np.array_equal(row["image"], np.array(page["image"])[top : top + 200, left : left + 200])
        for letter, box in boxes.items():
            room = min(box[0] - left, box[1] - top, left + 200 - box[2], top + 200 - box[3])
            if abs(room) > 2:  # boxes are not made of whole pixels
                assert (letter in row["text"]) == (room > 0)
            cut += 2 < -room < 20
        assert set(row["text"]) <= {*LETTERS, "\n"}
        seen |= set(row["text"])
    assert seen >= set(LETTERS) and cut > 20


@pytest.mark.parametrize(
    ("box", "page"),
    [
        ("[0 0 400 300]", "/Rotate 90"),
        ("[0 0 400 300]", "/Rotate 180"),
        ("[0 0 400 300]", "/Rotate 270"),
        ("[-50 -20 400 300]", "/CropBox [10 20 390 290]"),
        ("[0 0 400 300]", "/CropBox [10 20 390 290] /Rotate 90"),
    ],
)
def test_boxes_lie_on_the_ink_of_rotated_and_cropped_pages_too(tmp_path, box, page):
    # A full stop, a line and an I have boxes of three shapes, so that a turned or mirrored box is seen.
    content = "BT /F 40 Tf 50 200 Td (I) Tj 150 -100 Td (_) Tj 100 40 Td (.) Tj ET"
    write_pdf(tmp_path / "a.pdf", [content], box, page)
    maker = PdfCrops(tmp_path, page_size=900)
    with pypdfium2.PdfDocument(tmp_path / "a.pdf") as pdf:
        image, characters, boxes = maker.read_page(pdf[0])
    assert max(image.size) == 900
    dark = np.array(image.convert("L")) < 128
    visible = [(character, box) for character, box in zip(characters, boxes) if not character.isspace()]
    assert len(visible) == 3
    for _, (left, top, right, bottom) in visible:
        rows, columns = np.nonzero(dark[round(top) - 3 : round(bottom) + 3, round(left) - 3 : round(right) + 3])
        extent = (np.ptp(rows) + 1, np.ptp(columns) + 1)
        assert extent == pytest.approx((bottom - top, right - left), abs=2.5)
        dark[round(top) - 3 : round(bottom) + 3, round(left) - 3 : round(right) + 3] = False
    assert not dark.any()


def test_text_is_in_reading_order_with_the_spaces_hyphens_and_lines_of_the_page(tmp_path):
    lines = "BT /F 20 Tf 24 TL 40 200 Td (Two words, com-) Tj T* (mands \\(here\\)) Tj T* (done.) Tj ET"
    write_pdf(tmp_path / "a.pdf", [lines])
    (page,) = crops(tmp_path, crop_size=[600, 800], crops_per_page=1)
    assert page["text"] == "Two words, com-\nmands (here)\ndone."


def test_text_inside_joins_what_is_inside_and_breaks_lines_at_what_is_not():
    characters = list("ab cd\r\nef")
    boxes = np.array([[10.0 * place, 0, 10.0 * place + 8, 5] for place in range(len(characters))])
    boxes[2] = boxes[5] = boxes[6] = 0  # PDFium's own spaces have no place
    assert text_inside(characters, boxes, (0, 0, 100, 5)) == "ab cd\nef"
    assert text_inside(characters, boxes, (10, 0, 38, 5)) == "b c"
    assert text_inside(characters, boxes, (11, 0, 37, 5)) == ""
    boxes[3] += (0, 0, 0, 1)
    assert text_inside(characters, boxes, (0, 0, 100, 5)) == "ab\nd\nef"
    assert text_inside([], boxes[:0], (0, 0, 100, 5)) == ""


def test_a_glyph_of_unknown_character_is_marked(tmp_path):
    write_pdf(tmp_path / "a.pdf", ["BT /F 20 Tf 40 200 Td (ABA) Tj ET"], encoding="<< /Differences [66 /mystery] >>")
    (page,) = crops(tmp_path, crop_size=[600, 800], crops_per_page=1)
    assert page["text"] == f"A{UNKNOWN}A"


def test_nearly_empty_crops_and_pages_smaller_than_a_crop_are_left_out_and_counted(folder):
    note = Note()
    everything, rows = crops(folder, crops_per_page=50), crops(folder, note, crops_per_page=50, min_ink=0.01)
    dark = [(np.array(row["image"].convert("L")) < 128).mean() for row in everything]
    expected = [row["text"] for row, share in zip(everything, dark) if share >= 0.01]
    assert [row["text"] for row in rows] == expected and 0 < len(rows) < 50
    assert note.left_out == {"crops that are nearly empty": 50 - len(rows)}
    note = Note()
    assert not crops(folder, note, crop_size=[601, 20], page_size=[900, 800])  # the page is 600 high
    assert note.left_out == {"pages smaller than a crop": 1}


def test_pages_keep_their_proportions_and_are_as_large_as_the_size_asked_for_allows(folder):
    note = Note()
    write_pdf(folder / "banner.pdf", [SCATTERED], "[0 0 1260 300]")
    write_pdf(folder / "a4.pdf", [SCATTERED], "[0 0 595.276 841.89]")
    maker = PdfCrops(folder, page_size=[1782, 1260], crop_size=512, min_ink=0.0)
    rows = list(maker.rows(list(maker.pages()), note))
    assert [row["pdf"] for row in rows] == ["a4.pdf"] * 10 + ["letters.pdf"] * 10
    assert note.left_out == {"pages smaller than a crop": 1}
    for name, size in (("a4.pdf", (1260, 1782)), ("letters.pdf", (1260, 945)), ("banner.pdf", (1260, 300))):
        with pypdfium2.PdfDocument(folder / name) as pdf:
            assert maker.read_page(pdf[0])[0].size == size


def test_places_are_random_and_depend_on_seed_pdf_and_page_alone(folder):
    write_pdf(folder / "many.PDF", [SCATTERED] * 3)
    maker = PdfCrops(folder, [600, 800], 200, min_ink=0.0)
    items = list(maker.pages())
    assert [(item.name, item.page) for item in items] == [
        ("letters.pdf", 0),
        *(("many.PDF", page) for page in range(3)),
    ]

    def places(maker, items):
        return [(row["pdf"], row["page"], row["left"], row["top"]) for row in maker.rows(items, Note())]

    assert places(maker, items) == [place for item in items for place in places(maker, [item])]
    assert len({place[2:] for place in places(maker, items)}) > 30
    assert places(maker, items) != places(PdfCrops(folder, [600, 800], 200, min_ink=0.0, seed=1), items)


def test_encrypted_broken_and_empty_pdfs_are_reported_and_the_others_read(folder):
    secret = "/ID [<00><00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{0}> /U <{0}> >>".format("ab" * 32)
    write_pdf(folder / "encrypted.pdf", [SCATTERED], trailer=secret)
    write_pdf(folder / "missing.pdf", [SCATTERED, None, SCATTERED])
    write_pdf(folder / "nopages.pdf", [])
    (folder / "empty.pdf").touch()
    # A file name that is not Unicode, which parquet files and JSON could not hold.
    Path(os.fsdecode(os.fsencode(folder) + b"/n\xe4me.pdf")).write_bytes((folder / "letters.pdf").read_bytes())
    (folder / "garbage.pdf").write_bytes(b"%PDF-1.4\n" + bytes(range(256)))
    note = Note()
    rows = crops(folder, note, crops_per_page=2)
    assert [(row["pdf"], row["page"]) for row in rows] == [
        *[("letters.pdf", 1)] * 2,
        *[("missing.pdf", 1)] * 2,
        *[("missing.pdf", 3)] * 2,
        *[("n\ufffdme.pdf", 1)] * 2,
    ]
    broken = {source["name"]: source["reason"] for source in note.broken}
    assert set(broken) == {"encrypted.pdf", "empty.pdf", "garbage.pdf", "missing.pdf, page 2", "nopages.pdf"}
    assert "password" in broken["encrypted.pdf"] and all(broken.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": [1, 2, 3]}, r"`page_size` must be one whole number or \(height, width\)"),
        ({"crop_size": 0}, "`crop_size` must be at least 1, got 0"),
        ({"crop_size": [100, 900]}, r"crops of \(100, 900\) pixels .* do not fit into pages of \(600, 800\)"),
        ({"crops_per_page": 0}, "`crops_per_page` must be positive, got 0"),
        ({"min_ink": 1.5}, r"`min_ink` must lie in \[0, 1\], got 1.5"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
        ({"folder": "nowhere"}, "nowhere holds no PDFs"),
    ],
)
def test_bad_arguments_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        PdfCrops(**{"folder": folder, "page_size": [600, 800], "crop_size": 200, **options})
