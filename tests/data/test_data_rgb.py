"""dnd_hf.data.rgb: what an image of any mode shows is what the model sees."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from dnd_hf.data.images import ImageTransform, TenCrop, open_image
from dnd_hf.data.rgb import as_rgb, parse_background


RED, HALF = (200, 0, 0), 128


def pixels(image: Image.Image, background: str = "white") -> list[tuple[int, ...]]:
    assert as_rgb(image).mode == "RGB" and as_rgb(image).size == image.size
    return [tuple(pixel) for pixel in np.array(as_rgb(image, parse_background(background))).reshape(-1, 3).tolist()]


def over(colour: int, alpha: int, background: int) -> int:
    """Porter and Duff's "over" on an opaque background."""
    return round((colour * alpha + background * (255 - alpha)) / 255)


@pytest.mark.parametrize(("name", "background"), [("white", 255), ("black", 0), ("#404040", 64)])
def test_transparent_images_are_laid_on_the_background(name, background):
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, HALF, 0)):
        image.putpixel((x, 0), (*RED, alpha))
    expected = [tuple(over(level, alpha, background) for level in RED) for alpha in (255, HALF, 0)]
    assert np.abs(np.subtract(pixels(image, name), expected)).max() <= 1
    assert pixels(image, name)[2] == (background,) * 3
    grey = Image.new("LA", (2, 1), (90, 0))
    grey.putpixel((1, 0), (90, 255))
    palette = Image.new("PA", (2, 1), (1, 0))
    palette.putpalette([*RED, 90, 90, 90])
    palette.putpixel((1, 0), (1, 255))
    for other in (grey, grey.convert("La"), palette):
        assert pixels(other, name) == [(background,) * 3, (90, 90, 90)], other.mode
    assert pixels(image.convert("RGBa"), name)[2] == (background,) * 3


def test_a_transparent_entry_of_a_palette_is_the_background():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putpixel((1, 0), 1)
    for transparency in (0, b"\x00\xff"):
        image.info["transparency"] = transparency
        assert pixels(image, "#0000ff") == [(0, 0, 255), (0, 200, 0)]


def png(bits: int, colour_type: int, row: bytes, width: int, transparent: bytes) -> Image.Image:
    """A PNG of one row, opened; Pillow cannot write most of these."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": transparent, b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks.items())
    return open_image({"bytes": content, "path": None})


@pytest.mark.parametrize(
    ("bits", "colour_type", "row", "transparent", "expected"),
    [
        (1, 0, bytes([0b01000000]), struct.pack(">H", 1), [(0,) * 3, (9,) * 3]),
        (2, 0, bytes([0b01100000]), struct.pack(">H", 1), [(9,) * 3, (170,) * 3]),
        (4, 0, bytes([0x1F]), struct.pack(">H", 15), [(17,) * 3, (9,) * 3]),
        (8, 0, bytes([31, 255]), struct.pack(">H", 255), [(31,) * 3, (9,) * 3]),
        (16, 0, struct.pack(">HH", 257 * 40, 65535), struct.pack(">H", 65535), [(40,) * 3, (9,) * 3]),
        (8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">HHH", 4, 5, 6), [(1, 2, 3), (9,) * 3]),
        (16, 2, struct.pack(">6H", 256, 0, 0, 65535, 0, 0), struct.pack(">3H", 65535, 0, 0), [(1, 0, 0), (9,) * 3]),
    ],
)
def test_the_transparent_colour_of_a_png_of_any_depth_is_the_background(bits, colour_type, row, transparent, expected):
    assert pixels(png(bits, colour_type, row, 2, transparent), "#090909") == expected


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bits_of_grey_are_scaled_not_clipped(mode):
    levels = np.array([[0, 257, 257 * 128, 65535]])
    image = Image.fromarray(levels.astype({"I;16": "<u2", "I;16B": ">u2", "I": "i4"}[mode]))
    assert image.mode == mode and [pixel[0] for pixel in pixels(image)] == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0.2, 0.4]], np.float32), [51, 102]),
        (np.array([[-1, 0, 3]], np.float32), [0, 64, 255]),
        (np.array([[0, 2**20, 2**21]], np.int32), [0, 128, 255]),
        (np.array([[-(2**31), 2**31 - 1]], np.int32), [0, 255]),
        (np.array([[7.0, 7.0]], np.float32), [0, 0]),
    ],
)
def test_wider_greys_are_scaled_by_their_usual_range_or_their_own(levels, expected):
    file = BytesIO()
    Image.fromarray(levels).save(file, "TIFF")
    image = open_image({"bytes": file.getvalue(), "path": None})
    assert [pixel[0] for pixel in pixels(image)] == expected


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        as_rgb(Image.fromarray(np.array([[np.nan, 1]], np.float32)))


def test_opaque_images_are_what_pillow_converts_them_to():
    levels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"):
        image = Image.fromarray(levels).convert(mode)
        assert as_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_transforms_lay_images_on_their_background():
    image = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    for transform in (ImageTransform(8, background="black"), TenCrop(8, background="black")):
        assert (transform(image) == -1).all()
    assert (ImageTransform(8)(image) == 1).all()


def test_backgrounds_are_white_black_or_a_colour_in_hexadecimal():
    assert parse_background("#fF0010") == (255, 0, 16)
    for wrong in ("red", "#fff", "#12345g", "", None, "#1234567"):
        with pytest.raises(ValueError, match="`background` must be 'white', 'black' or '#RRGGBB'"):
            parse_background(wrong)
