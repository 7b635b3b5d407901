"""The tabs of the page: make an image and look inside, fill in a part of one, read one.

Each function makes the components of a tab, says which button starts what, and returns the components that another
model empties, with their empty values.
"""

from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from . import actions, uploads, views
from .controls import Controls
from .limits import as_message, check_whole
from .models import image_size, label_choices


ORDERS = {"Row by row": "rows", "Depth by depth": "depth"}
RANKS = {"Likelihood": "likelihood", "Guidance": "guidance"}
UNDER = ("the chosen label", "no label")
MAX_FEATHER = 8
PROGRESS = gr.Progress()
"""As a default it stands for the progress bar of the event."""
NO_IMAGE = "Generate an image first, or upload one."
EMPTY = views.inspector(None, [])
PRESS = views.empty("Press Generate to make an image.")
ADDS = views.empty("The image with one code per cell, with two, and so on.")
RESULT = views.empty("The result appears here.")
SCORE = views.empty("How probable the image is, and which label fits it best.")

SHOWN, PAINTED = 1024, 640
"""Pixels to which images are enlarged to be shown, and to be painted on, at least."""

Shown = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Made:
    """What a tab has made or read, kept for one visitor."""

    image: Image.Image
    look: actions.Look


def html(value: str, elem_class: str | None = None) -> gr.HTML:
    return gr.HTML(value, elem_classes=elem_class, padding=False)


def said(text: str) -> dict:
    """A note that takes no room where there is nothing to say."""
    return gr.update(value=text, visible=bool(text))


def image_output(label: str, elem_id: str | None = None) -> gr.Image:
    shown = dict(interactive=False, buttons=["fullscreen"], elem_classes="pixels", elem_id=elem_id, alt_text=label)
    return gr.Image(label=label, format="png", **shown)


def connect_clicks(image: gr.Image, made: gr.State, cells: gr.State, inside: gr.HTML) -> None:
    """A click on the image shows the cell below it."""

    @as_message
    def on_click(made: Made | None, cells: list, event: gr.SelectData):
        if made is None:
            return cells, EMPTY
        factor = uploads.enlargement(made.look.image, SHOWN)
        cells = views.clicked(made.look, cells, *(place / factor for place in event.index))
        return cells, views.inspector(made.look, cells)

    image.select(on_click, [made, cells], [cells, inside], show_progress="hidden", api_visibility="private")


def generate_tab(controls: Controls) -> tuple[gr.State, Shown]:
    """Makes images; also returns the state that holds the newest one, a `Made`."""
    limits, made, cells = controls.limits, gr.State(), gr.State([])
    order = gr.Radio(list(ORDERS), value="Row by row", label="Watch it come")
    with gr.Accordion("Choose the best of several", open=False), gr.Row():
        candidates = gr.Slider(1, limits.max_candidates, value=1, step=1, label="Candidates", min_width=160)
        rank = gr.Radio(list(RANKS), value="Likelihood", label="Best by", min_width=160)
    with gr.Row():
        button = gr.Button("Generate", variant="primary", scale=3, min_width=160)
        stop = gr.Button("Stop", scale=1, min_width=80)
    image = image_output("Image: click two of its cells")
    status = html(PRESS, "hint")
    html("<h3>Depth by depth</h3>")
    depths = html(ADDS, "views")
    html("<h3>Codes and probabilities</h3>")
    inside = html(EMPTY, "views")

    @as_message
    def on_generate(order, num_candidates, rank, progress=PROGRESS, *values):
        call = controls.call(*values)
        count = check_whole("The number of candidates", num_candidates, limits.max_candidates)
        steps = call.pipe.transformer.config.sequence_length
        watch = dict(by=ORDERS[order], num_candidates=count, rank_by=RANKS[rank])
        watch["on_step"] = lambda step: progress((step + 1, steps), unit="cells")
        frames = actions.generate(call.pipe, call.condition, call.seed, call.settings, **watch)
        for number, (frame, codes) in enumerate(frames, start=1):
            if codes is None:
                text = f"{'Row' if order == 'Row by row' else 'Depth'} {number}"
                yield {image: uploads.enlarged(frame, SHOWN), status: text, controls.seed: call.seed}
        look = actions.look_inside(call.pipe, call.condition, codes)
        yield {
            image: uploads.enlarged(frame, SHOWN),
            status: views.download_link(frame, call.seed),
            controls.seed: call.seed,
            made: Made(frame, look),
            cells: [],
            depths: views.depth_views(actions.coarse_to_fine(call.pipe, codes)),
            inside: views.inspector(look, []),
        }

    outputs = [image, status, controls.seed, made, cells, depths, inside]
    inputs = [order, candidates, rank, *controls.inputs]
    started = gr.on([button.click, controls.prompt.submit], on_generate, inputs, outputs, **controls.heavy)
    stop.click(None, cancels=started, api_visibility="private")
    connect_clicks(image, made, cells, inside)
    return made, [(image, None), (status, PRESS), (made, None), (cells, []), (depths, ADDS), (inside, EMPTY)]


def source_buttons() -> tuple[gr.Button, gr.UploadButton]:
    """Where an image comes from."""
    with gr.Row():
        generated = gr.Button("Use the generated image", min_width=220)
        upload = gr.UploadButton("Upload an image", file_types=["image"], type="filepath", min_width=220)
    return generated, upload


def connect_source(
    controls: Controls,
    made: gr.State,
    buttons: tuple[gr.Button, gr.UploadButton],
    source: gr.State,
    shown: gr.Image | gr.ImageEditor,
    note: gr.HTML,
    least: int,
) -> None:
    """The buttons set the source, an image of the model's size, and show it enlarged."""

    @as_message
    def on_generated(made: Made | None):
        if made is None:
            raise ValueError(NO_IMAGE)
        return made.image, uploads.enlarged(made.image, least), said("")

    @as_message
    def on_upload(path, model):
        opened = uploads.open_upload(path, controls.limits)
        image, text = uploads.fitted(opened, image_size(controls.models.get(model)))
        return image, uploads.enlarged(image, least), said(text)

    generated, upload = buttons
    generated.click(on_generated, made, [source, shown, note], api_visibility="private")
    upload.upload(on_upload, [upload, controls.model], [source, shown, note], **controls.heavy)


def fill_tab(controls: Controls, made: gr.State) -> Shown:
    """Fills in the part of an image that is painted over."""
    limits, source = controls.limits, gr.State()
    buttons = source_buttons()
    editor = gr.ImageEditor(
        label="Paint the hole",
        type="pil",
        sources=[],
        layers=False,
        transforms=[],
        buttons=[],
        brush=gr.Brush(default_size=24, colors=["#e11d48"], color_mode="fixed"),
        placeholder="Use the generated image, or upload one",
        elem_id="editor",
    )
    note = gr.HTML(elem_classes="hint", padding=False, visible=False)
    region = gr.Radio(list(uploads.REGIONS), value=uploads.REGIONS[0], label="Fill in")
    with gr.Row():
        particles = gr.Slider(
            1,
            limits.max_particles,
            value=min(4, limits.max_particles),
            step=1,
            label="Particles",
            info="More heed what comes after the hole.",
            min_width=160,
        )
        feather = gr.Slider(
            0, MAX_FEATHER, value=0, step=1, label="Feather", info="Blended pixels around it.", min_width=160
        )
    button = gr.Button("Fill in", variant="primary")
    image = image_output("Filled in")
    given = html(RESULT, "views")

    @as_message
    def on_fill(source, painted, region, num_particles, feather, progress=PROGRESS, *values):
        if source is None:
            raise ValueError(NO_IMAGE)
        call, size = controls.call(*values), (source.height, source.width)
        count = check_whole("The number of particles", num_particles, limits.max_particles)
        painted_over = region == uploads.REGIONS[0]
        mask = uploads.painted_mask(painted, size) if painted_over else uploads.region_mask(region, size)
        steps = call.pipe.transformer.config.sequence_length
        how = dict(num_particles=count, feather=check_whole("Feather", feather, MAX_FEATHER, least=0))
        how["on_step"] = lambda step: progress((step + 1, steps), unit="cells")
        filled = actions.fill_in(call.pipe, call.condition, source, mask, call.seed, call.settings, **how)
        pairs = [(source, "Before"), (views.with_hole(source, mask), "Given"), (filled, "Filled in")]
        below = f"{views.download_link(filled, call.seed)}{views.side_by_side(pairs)}"
        return uploads.enlarged(filled, SHOWN), below, call.seed

    connect_source(controls, made, buttons, source, editor, note, PAINTED)
    inputs = [source, editor, region, particles, feather, *controls.inputs]
    button.click(on_fill, inputs, [image, given, controls.seed], **controls.heavy)
    return [(source, None), (editor, None), (note, said("")), (image, None), (given, RESULT)]


def read_tab(controls: Controls, made: gr.State) -> Shown:
    """Says of an image what the model makes of it: reconstructions, scores, labels, and its codes."""
    source, read, cells = gr.State(), gr.State(), gr.State([])
    buttons = source_buttons()
    given = image_output("The image to read", elem_id="source")
    note = gr.HTML(elem_classes="hint", padding=False, visible=False)
    under = gr.Radio(list(UNDER), value=UNDER[0], label="Score under")
    button = gr.Button("Read", variant="primary")
    with gr.Row():
        with gr.Column(min_width=240):
            score = html(SCORE, "views")
        with gr.Column(min_width=240):
            classes = html("", "views")
    html("<h3>Reconstructions, depth by depth</h3>")
    depths = html(ADDS, "views")
    html("<h3>Codes and probabilities</h3>")
    image = image_output("As all codes decode it: click two of its cells")
    inside = html(EMPTY, "views")

    @as_message
    def on_read(source, under, model, label, prompt):
        if source is None:
            raise ValueError(NO_IMAGE)
        pipe, prompt = controls.models.get(model), controls.checked_prompt(prompt)
        condition = actions.condition_of(pipe, label, prompt) if under == UNDER[0] else {}
        num_classes, most = pipe.transformer.config.num_classes, controls.limits.max_classified_labels
        reading = actions.read(pipe, source, condition, classify=1 < num_classes <= most)
        too_many = views.empty(f"This page does not classify among {num_classes} labels: each costs a pass.")
        names = [name for name, _ in label_choices(pipe)]
        return {
            score: views.score_view(reading, f"under {under}"),
            classes: too_many if num_classes > most else views.class_view(reading, names),
            depths: views.depth_views(reading.reconstructions),
            image: uploads.enlarged(reading.look.image, SHOWN),
            inside: views.inspector(reading.look, []),
            read: Made(source, reading.look),
            cells: [],
        }

    connect_source(controls, made, buttons, source, given, note, SHOWN)
    outputs = [score, classes, depths, image, inside, read, cells]
    button.click(on_read, [source, under, *controls.condition], outputs, **controls.heavy)
    connect_clicks(image, read, cells, inside)
    emptied = [
        (source, None),
        (given, None),
        (note, said("")),
        (score, SCORE),
        (classes, ""),
        (depths, ADDS),
        (image, None),
    ]
    return [*emptied, (inside, EMPTY), (read, None), (cells, [])]
