"""The settings that all tabs share: the model, what it is told to make, and how codes are drawn."""

from dataclasses import dataclass
from secrets import randbelow
from typing import Any

import gradio as gr

from dnd_hf import DnDPipeline
from dnd_hf.generation.settings import SamplingSettings

from .actions import condition_of, sampling_settings
from .limits import SEEDS, Limits, check_whole
from .models import Models, image_size, label_choices, reads_text


TABLE = ("Depth", "Temperature", "Top-k", "Top-p")


@dataclass(frozen=True)
class Call:
    """The values of the controls, as an action takes them."""

    pipe: DnDPipeline
    condition: dict[str, Any]
    seed: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Controls:
    """The components, and the models and limits behind them.

    Args:
        heavy: keywords of events that run a model: these wait for one another.
    """

    models: Models
    limits: Limits
    heavy: dict[str, Any]
    model: gr.Dropdown
    info: gr.HTML
    label: gr.Dropdown
    prompt: gr.Textbox
    seed: gr.Number
    random: gr.Checkbox
    guidance: gr.Slider
    table: gr.Dataframe

    @property
    def condition(self) -> list:
        """The inputs of [`reading`]."""
        return [self.model, self.label, self.prompt]

    @property
    def inputs(self) -> list:
        """The inputs of [`call`]."""
        return [*self.condition, self.seed, self.random, self.guidance, self.table]

    @property
    def outputs(self) -> list:
        """What [`controls_of`] sets."""
        return [self.info, self.label, self.prompt, self.guidance, self.table]

    def checked_prompt(self, prompt: str | None) -> str:
        if prompt and len(prompt) > self.limits.max_prompt_characters:
            raise ValueError(f"The prompt must have at most {self.limits.max_prompt_characters} characters.")
        return prompt or ""

    def call(self, model, label, prompt, seed, random, guidance, table) -> Call:
        """What the controls say; a random seed is drawn here.

        Raises:
            ValueError: what can be seen to be wrong before anything is computed.
        """
        pipe = self.models.get(model)
        condition = condition_of(pipe, label, self.checked_prompt(prompt))
        guidance = guidance if pipe.transformer.config.has_null_class else None
        seed = randbelow(SEEDS) if random else check_whole("The seed", seed, SEEDS - 1, least=0)
        return Call(pipe, condition, seed, sampling_settings(guidance, table))


def make_controls(models: Models, limits: Limits, heavy: dict[str, Any]) -> Controls:
    """The components, in the order in which they stand; [`controls_of`] fills them."""
    model = gr.Dropdown(
        models.names,
        value=models.names[0],
        label="Model",
        allow_custom_value=models.allow_others,
        info="One of these, or the id of a pipeline on the Hub." if models.allow_others else None,
    )
    info = gr.HTML(elem_classes="hint", padding=False)
    label = gr.Dropdown([], label="Label", visible=False)
    prompt = gr.Textbox(label="Prompt", max_length=limits.max_prompt_characters, lines=2, visible=False)
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, min_width=120)
        random = gr.Checkbox(False, label="Random seed", min_width=120, elem_id="random")
    guidance = gr.Slider(0, 10, value=1, step=0.1, label="Guidance scale", visible=False)
    with gr.Accordion("Sampling per depth", open=False):
        table = gr.Dataframe(
            headers=list(TABLE),
            datatype="number",
            type="array",
            static_columns=[0],
            interactive=True,
            show_label=False,
            buttons=[],
            elem_id="table",
        )
        gr.HTML("Top-k 0 and top-p 1 leave all codes in.", elem_classes="hint", padding=False)
    return Controls(models, limits, heavy, model, info, label, prompt, seed, random, guidance, table)


def controls_of(pipe: DnDPipeline) -> list:
    """The outputs of [`Controls`] for a model, the settings being those of its checkpoint."""
    config = pipe.transformer.config
    settings = SamplingSettings.resolve(config, pipe.transformer.generation_config)
    choices = [] if reads_text(pipe) else label_choices(pipe)
    columns = (range(1, config.code_depth + 1), settings.temperature, settings.top_k, settings.top_p)
    rows = [list(row) for row in zip(*columns)]
    return [
        description(pipe),
        gr.Dropdown(choices=choices, value=choices[0][1] if choices else None, visible=len(choices) > 1),
        gr.Textbox(value="", visible=reads_text(pipe)),
        gr.Slider(value=settings.guidance_scale, visible=config.has_null_class),
        gr.Dataframe(value=rows),
    ]


def description(pipe: DnDPipeline) -> str:
    """What a model makes, in a line."""
    config, (height, width) = pipe.transformer.config, image_size(pipe)
    rows, columns = config.grid_size
    told = "Text" if reads_text(pipe) else f"{config.num_classes} labels" if config.num_classes > 1 else "No labels"
    cells = f"{columns}×{rows} cells, {config.code_depth} of {config.vocab_size} codes each"
    return f"{told} · {width}×{height} pixels · {cells}"
