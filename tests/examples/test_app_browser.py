"""The demo page in a real browser: it loads, generates, streams, fills in, reads, refuses, and asks no other server."""

import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
from demo.limits import Limits  # noqa: E402
from demo.models import Models  # noqa: E402
from demo.page import build_page, serving  # noqa: E402


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser installed ({', '.join(BROWSERS)})")

# Every image that the page shows in its first output, in order; some are there for an instant.
WATCH = """
window.shown = [];
new MutationObserver(() => {
    const image = document.querySelector('.pixels .image-frame img');
    if (image && window.shown.at(-1) !== image.src) window.shown.push(image.src);
}).observe(document, {subtree: true, childList: true, attributes: true, attributeFilter: ['src']});
"""


@contextmanager
def served(names: list[str]) -> Iterator[SimpleNamespace]:
    """The page with these models, as `python examples/app.py` serves it."""
    most = Image.MAX_IMAGE_PIXELS
    limits, models = Limits(), Models(names)
    page = build_page(models, limits, concurrency=1, max_queue=8)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **serving(limits))
    yield SimpleNamespace(url=url, models=models, pipe=models.get(names[0]))
    page.close()
    Image.MAX_IMAGE_PIXELS = most


@pytest.fixture(scope="module")
def server():
    """The page with the bundled model."""
    with served(["words"]) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # Without a sandbox it runs as root, as in containers.
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, url: str) -> Iterator:
    """The loaded page; in the end, no error may have been on its console, and no other server asked."""
    context = browser.new_context(viewport={"width": 900, "height": 700})
    page, errors, elsewhere = context.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    local = (url, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(local) else elsewhere.append(request.url))
    page.add_init_script(WATCH)
    page.set_default_timeout(60_000)
    page.goto(url)
    page.get_by_label("Label", exact=True).wait_for()
    yield page
    context.close()
    assert errors == [] and elsewhere == []


@pytest.fixture
def page(server, browser):
    with opened(browser, server.url) as page:
        yield page


def fetched(url: str) -> np.ndarray:
    with urllib.request.urlopen(url, timeout=30) as response:
        return np.asarray(Image.open(BytesIO(response.read())).convert("RGB")).astype(int)


def generate(page) -> list[np.ndarray]:
    """Presses Generate; the images that were shown, each pixel of the model once."""
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_role("link", name="Download 128×32 PNG").first.wait_for()
    frames = [fetched(url) for url in page.evaluate("window.shown")]
    for frame in frames:
        np.testing.assert_array_equal(frame, frame[::8, ::8].repeat(8, 0).repeat(8, 1))
    return [frame[::8, ::8] for frame in frames]


def expected_image(pipe, **settings) -> np.ndarray:
    return np.asarray(pipe("ALARM", **settings).images[0]).astype(int)


def test_an_image_comes_row_by_row_and_is_that_of_the_pipeline_with_this_seed(page, server):
    page.get_by_label("Seed", exact=True).fill("7")
    *rows, last = generate(page)
    np.testing.assert_array_equal(last, expected_image(server.pipe, generator=7))
    assert rows and any(np.isin(row[24:], (127, 128)).all() for row in rows)  # grey where nothing was drawn yet

    image = page.locator(".pixels .image-frame img").first
    box = image.bounding_box()
    for x, y in ((0.5, 2.5), (15.5, 3.5)):  # columns of 16, rows of 4
        image.click(position={"x": box["width"] * x / 16, "y": box["height"] * y / 4})
        page.get_by_text(f"row {int(y) + 1}, column {int(x) + 1}").wait_for()
    codes = server.pipe("ALARM", generator=7, output_type="codes").images[0]
    for name, (row, column) in (("A", (2, 0)), ("B", (3, 15))):
        drawn = page.locator(f".card-{name} td b").all_inner_texts()
        assert list(map(int, drawn)) == codes[row, column].tolist()
    assert page.locator(".views figcaption", has_text=": mean ").count() == 4


def test_wrong_input_is_answered_by_a_message_and_the_page_works_on(page, server):
    page.get_by_label("Seed", exact=True).fill("-1")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_text("The seed must be a whole number from 0 to 4294967295, got -1.").wait_for()
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_label("Depth by depth").check()
    frames = generate(page)
    np.testing.assert_array_equal(frames[-1], expected_image(server.pipe, generator=7))


def test_an_upload_is_read_and_a_file_that_is_no_image_refused(browser, make_pipeline, tmp_path):
    make_pipeline(id2label=dict(enumerate(["one", "two", "three", "four"]))).save_pretrained(tmp_path / "tiny")
    (tmp_path / "text.png").write_text("no image")
    with served([str(tmp_path / "tiny")]) as server, opened(browser, server.url) as page:
        (image,) = server.pipe("three", generator=1).images
        image.save(tmp_path / "image.png")
        page.get_by_role("tab", name="Read").click()
        for name in ("text.png", "image.png"):
            with page.expect_file_chooser() as chooser:
                page.get_by_role("button", name="Upload an image").click()
            chooser.value.set_files(tmp_path / name)
            if name == "text.png":
                page.get_by_text("The file must be an image (PNG, JPEG, WEBP, GIF, BMP).").wait_for()
        page.locator("#source img").wait_for()
        page.get_by_role("button", name="Read", exact=True).click()
        page.get_by_text("Most likely labels").wait_for()
        found = server.pipe.classify(image)
        share, best = (
            found.log_probs[0].exp().max().item(),
            server.pipe.transformer.config.id2label[found.labels.item()],
        )
        assert page.locator(".likely li").first.inner_text().split() == [best, f"{share:.1%}"]
        assert page.locator(".score strong").inner_text() == f"{server.pipe.score(image, 0).total.item():,.1f} nats"


def test_what_is_painted_over_is_filled_in_and_the_rest_stays(page, server):
    generate(page)
    page.get_by_role("tab", name="Fill in").click()
    page.get_by_role("button", name="Fill in", exact=True).click()
    page.get_by_text("Generate an image first, or upload one.").wait_for()
    page.get_by_role("button", name="Use the generated image").click()
    page.locator("#editor button[aria-label=Undo]:enabled").wait_for()  # the image is drawn, which can be undone
    canvas = page.locator("#editor canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 40, middle[1], steps=2)
    page.mouse.up()
    page.get_by_role("button", name="Fill in", exact=True).click()
    page.get_by_text("Given", exact=True).wait_for()
    pictures = page.locator("figure:has(figcaption)").filter(visible=True)
    before, given, filled = (
        np.asarray(Image.open(urllib.request.urlopen(picture.locator("img").get_attribute("src")))).astype(int)
        for picture in pictures.all()
    )
    hole = (given != before).any(-1)
    assert 10 < hole.sum() < 1000 and hole[16, 64]
    np.testing.assert_array_equal(before, expected_image(server.pipe, generator=0))
    np.testing.assert_array_equal(filled[~hole], before[~hole])
    mask = Image.fromarray(hole)
    call = dict(generator=0, image=Image.fromarray(before.astype(np.uint8)), mask_image=mask, num_particles=4)
    np.testing.assert_array_equal(filled, expected_image(server.pipe, **call))


def test_stop_ends_the_sampling_and_the_next_image_is_whole(page, server, monkeypatch):
    decode_codes, frames = server.pipe.vqvae.decode_codes, []

    def slowly(*args, **options):
        frames.append(time.sleep(1))
        return decode_codes(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(server.pipe.vqvae, "decode_codes", slowly)
        page.get_by_role("button", name="Generate", exact=True).click()
        page.get_by_text("Row 1", exact=True).wait_for()
        page.get_by_role("button", name="Stop").click()
        page.wait_for_timeout(3000)
        assert 1 <= len(frames) <= 3  # of nine: four rows, the image, and one for each depth
    np.testing.assert_array_equal(generate(page)[-1], expected_image(server.pipe, generator=0))


def test_another_model_empties_the_page_and_brings_its_own_controls(browser, make_pipeline, make_rq_pipeline, tmp_path):
    make_pipeline(num_classes=2, id2label={0: "first", 1: "second"}).save_pretrained(tmp_path / "labels")
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "red": 2, "house": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    reader = make_rq_pipeline(prompt_length=3, prompt_vocab_size=4, id2label=None)
    reader.register_modules(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    )
    reader.save_pretrained(tmp_path / "prompts")
    names = [str(tmp_path / "labels"), str(tmp_path / "prompts")]
    with served(names) as server, opened(browser, server.url) as page:
        page.get_by_role("button", name="Generate", exact=True).click()
        page.get_by_role("link", name="Download 6×4 PNG").first.wait_for()
        page.get_by_label("Model", exact=True).click()
        page.get_by_role("option", name=names[1]).click()
        page.get_by_role("textbox", name="Prompt").wait_for()
        page.get_by_text("Press Generate to make an image.").wait_for()
        assert page.get_by_label("Label", exact=True).count() == page.locator(".pixels .image-frame").count() == 0
        page.get_by_role("button", name="Generate", exact=True).click()
        page.get_by_text("Write a prompt first.").wait_for()
        page.get_by_role("textbox", name="Prompt").fill("red house")
        page.get_by_role("button", name="Generate", exact=True).click()
        link = page.get_by_role("link", name="Download 6×4 PNG").first
        image = np.asarray(Image.open(urllib.request.urlopen(link.get_attribute("href"))))
        np.testing.assert_array_equal(image, server.models.get(names[1])(prompt="red house", generator=0).images[0])


@pytest.mark.parametrize("path", ["/etc/hostname", str(Path(__file__)), "setup.cfg", "../setup.cfg"])
def test_files_of_the_server_are_not_served(path, server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.url}gradio_api/file={path}", timeout=30)
    assert refused.value.code in (403, 404)


def test_too_large_uploads_are_refused(server):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        + bytes(9 << 20)
        + b"\r\n--x--\r\n"
    )
    request = urllib.request.Request(f"{server.url}gradio_api/upload", body)
    request.add_header("Content-Type", "multipart/form-data; boundary=x")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 413


def test_no_action_is_offered_to_programs(server):
    with urllib.request.urlopen(f"{server.url}gradio_api/info", timeout=30) as response:
        assert json.load(response)["named_endpoints"] == {}
