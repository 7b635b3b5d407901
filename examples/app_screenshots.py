# /// script
# requires-python = ">=3.11"
# dependencies = ["dnd-hf[test]"]
#
# [tool.uv.sources]
# dnd-hf = { path = "..", editable = true }
# ///
"""Takes the screenshots of the demo page that the documentation shows, by an installed Chromium.

python examples/app_screenshots.py
python examples/app_screenshots.py --every_view --output_dir views
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.hf_argparser import HfArg

from dnd_hf.command_line import run_script


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = ("light", "dark")
SHOTS = (
    ("generate", "desktop", "light"),
    ("fill", "desktop", "dark"),
    ("read", "phone", "light"),
    ("generate", "phone", "dark"),
)
"""Those of the documentation."""
CELLS = ((5.5, 1.5), (10.5, 2.5))
"""(column, row) of the clicks, in cells of `words`."""


@dataclass
class ScreenshotArguments:
    """Options of this script."""

    output_dir: str = HfArg(default="docs/images", help="Folder of the screenshots, app_*.png.")
    browser: str = HfArg(default="chromium", help="Name or path of an installed Chromium or Chrome.")
    every_view: bool = HfArg(default=False, help="All tabs at all widths, light and dark, to look at after a change.")

    def __post_init__(self):
        if shutil.which(self.browser) is None:
            raise ValueError(f"`browser` must be an installed Chromium or Chrome, got {self.browser!r}.")


def generate(page: Any) -> None:
    """Makes an image and clicks two of its cells."""
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_role("link", name="Download").first.wait_for()
    image = page.locator(".pixels .image-frame img").first
    for name, (column, row) in zip("AB", CELLS):
        box = image.bounding_box()
        image.click(position={"x": box["width"] * column / 16, "y": box["height"] * row / 4})
        page.locator(f".card-{name}").first.wait_for()


def fill(page: Any) -> None:
    """Paints over a letter of the generated image and fills it in."""
    page.get_by_role("tab", name="Fill in").click()
    page.get_by_role("button", name="Use the generated image").first.click()
    page.locator("#editor button[aria-label=Undo]:enabled").wait_for()  # the image is drawn, which can be undone
    canvas = page.locator("#editor canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5
    page.mouse.move(x, y - 12)
    page.mouse.down()
    page.mouse.move(x, y + 12, steps=3)
    page.mouse.up()
    page.get_by_role("button", name="Fill in", exact=True).click()
    page.get_by_text("Given", exact=True).wait_for()


def read(page: Any) -> None:
    """Reads the generated image."""
    page.get_by_role("tab", name="Read").click()
    page.get_by_role("button", name="Use the generated image").last.click()
    page.locator("#source img").wait_for()
    page.get_by_role("button", name="Read", exact=True).click()
    page.get_by_text("Most likely labels").wait_for()


TABS = {"generate": generate, "read": read, "fill": fill}  # the editor, a slow one without a GPU, comes last


def save(page: Any, path: Path) -> None:
    """Writes the whole page in 256 colours, so that the file is small."""
    page.mouse.move(0, 0)
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(1000)  # transitions
    page.screenshot(path=path, full_page=True, animations="disabled")
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


def main(args: ScreenshotArguments) -> None:
    from demo.limits import Limits
    from demo.models import Models
    from demo.page import build_page, serving
    from playwright.sync_api import sync_playwright

    limits, output_dir = Limits(), Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    blocks = build_page(Models(["words"]), limits, concurrency=1, max_queue=8)
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **serving(limits))
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which(args.browser), args=["--no-sandbox"])
        for scheme in SCHEMES:
            for device, width in WIDTHS.items():
                context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
                page = context.new_page()
                page.set_default_timeout(60_000)
                page.goto(url)
                page.get_by_label("Label", exact=True).click()
                page.get_by_role("option", name="TIGER").click()
                for tab, show in TABS.items():
                    if tab == "generate" or args.every_view or (tab, device, scheme) in SHOTS:
                        show(page)
                    if args.every_view or (tab, device, scheme) in SHOTS:
                        save(page, output_dir / f"app_{tab}_{device}_{scheme}.png")
                context.close()
        browser.close()
    blocks.close()


if __name__ == "__main__":
    run_script(main, ScreenshotArguments)
