"""The page as a whole: its layout, and how it is served."""

from pathlib import Path
from typing import Any

import gradio as gr

from .controls import controls_of, make_controls
from .limits import Limits, as_message
from .models import Models
from .tabs import fill_tab, generate_tab, read_tab
from .uploads import guard_pillow


STYLE = Path(__file__).with_name("page.css")
TITLE = "<h1>dnd_hf</h1><p>Images from an autoregressive model of residual codes, several for each cell of a grid.</p>"
FILES_KEPT = (3600, 3600)
"""Seconds: how often files of images are looked through, and the age at which they are deleted."""


def build_page(models: Models, limits: Limits, concurrency: int, max_queue: int) -> gr.Blocks:
    """The page; [`serving`] has the keywords of its `launch`.

    Args:
        concurrency: how many actions run a model at a time; the others wait.
        max_queue: how many may wait; further ones are told that the queue is full.
    """
    guard_pillow(limits)
    heavy = dict(concurrency_id="model", concurrency_limit=concurrency, api_visibility="private")
    with gr.Blocks(title="dnd_hf", analytics_enabled=False, delete_cache=FILES_KEPT) as page:
        gr.HTML(TITLE, elem_id="header", padding=False)
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=2, min_width=300):
                controls = make_controls(models, limits, heavy)
            with gr.Column(scale=5, min_width=340), gr.Tabs():
                with gr.Tab("Generate"):
                    made, shown = generate_tab(controls)
                with gr.Tab("Fill in"):
                    shown += fill_tab(controls, made)
                with gr.Tab("Read"):
                    shown += read_tab(controls, made)

        @as_message
        def on_model(name):
            return [*controls_of(models.get(name)), *(value for _, value in shown)]

        outputs = [*controls.outputs, *(component for component, _ in shown)]
        gr.on([page.load, controls.model.change], on_model, controls.model, outputs, show_progress="hidden", **heavy)
    return page.queue(max_size=max_queue, api_open=False)


def serving(limits: Limits) -> dict[str, Any]:
    """Keywords of `launch`: nothing is loaded from elsewhere, no file of the server is served, uploads are small."""
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_500")  # the theme's own is too pale to read
    return dict(
        theme=theme,
        css_paths=STYLE,
        max_file_size=f"{limits.max_upload_megabytes}mb",
        footer_links=[],
        ssr_mode=False,
        show_error=False,
        enable_monitoring=False,
        mcp_server=False,
        state_session_capacity=200,
    )
