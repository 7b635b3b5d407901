"""The steps of a [`DnDPipeline`] as blocks of a `ModularPipeline`, which diffusers calls experimental.

They call the functions that `DnDPipeline.__call__` calls, so the same arguments give the same images. Blocks pass on:
`conditions` (what is to be made), `canvas` (how large), `hole` (what of an image is kept), `codes`, and `images`.
"""

import os
from copy import deepcopy
from typing import Any, cast

import torch
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import (
    AutoPipelineBlocks,
    ComponentSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
    SequentialPipelineBlocks,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation.noise import checked_generators
from ..generation.settings import SamplingSettings
from ..ops.number_checks import whole_number
from .callbacks import CALLBACK_TENSORS, checked_tensor_inputs, step_function
from .conditions import read_conditions
from .inpainting import check_inpainting, hole_in
from .outpainting import checked_canvas
from .pipeline_dnd import DnDPipeline
from .sampling import check_output_type, check_positions_per_pass, decoded, sample_codes


TRANSFORMER = ComponentSpec("transformer", PreTrainedModel, description="samples the codes")
VQVAE = ComponentSpec("vqvae", ModelMixin, description="the RQVAE of these codes")
TOKENIZER = ComponentSpec(
    "tokenizer", PreTrainedTokenizerBase, description="of prompts, where the transformer reads text"
)
IMAGE_PROCESSOR = ComponentSpec("image_processor", VaeImageProcessor, default_creation_method="from_config")
SETTINGS = ("guidance_scale", "temperature", "top_k", "top_p", "guidance_schedule", "guidance_power")
NUM_IMAGES = InputParam("num_images_per_label", int, default=1, description="images of each label or prompt")


def _passed(name: str) -> InputParam:
    return InputParam(name, required=True, description="of an earlier block")


class DnDBlock(ModularPipelineBlocks):
    """A block, described by what it does, reads and writes; arguments are those of [`DnDPipeline.__call__`]."""

    model_name = "dnd"
    description = ""
    components: tuple[ComponentSpec, ...] = ()
    reads: tuple[InputParam, ...] = ()
    writes: OutputParam

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return list(self.components)

    @property
    def inputs(self) -> list[InputParam]:
        return list(self.reads)

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [self.writes]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        values = self.get_block_state(state)
        values[self.writes.name] = self.made(components, values)
        self.set_block_state(state, values)
        return components, state

    def made(self, components: ModularPipeline, values: Any) -> Any:
        """What the block writes, from what it reads."""
        raise NotImplementedError


class DnDConditionStep(DnDBlock):
    """Labels or prompts to `conditions`, `(n,)` or `(n, prompt_length)`."""

    description = "Reads class labels or prompts."
    components = (TRANSFORMER, TOKENIZER)
    reads = (
        InputParam("class_labels", description="ids or names of classes, one or several"),
        InputParam("prompt", str | list[str], description="one or several, for a transformer that reads text"),
    )
    writes = OutputParam("conditions", torch.Tensor, "of each label or prompt")

    def made(self, components, values):
        labels = read_conditions(components.transformer, components.tokenizer, values.class_labels, values.prompt)
        return labels.to(components._execution_device)


class DnDCanvasStep(DnDBlock):
    """Sizes in pixels to the `canvas`."""

    description = "Checks the size of the images; larger ones than the model's are made in windows that overlap."
    components = (TRANSFORMER, VQVAE)
    reads = (
        InputParam("height", int, description="in pixels; None: the model's own"),
        InputParam("width", int, description="in pixels; None: the model's own"),
        InputParam("overlap", int | tuple[int, int], description="of the windows, in cells; None: half of the model's"),
    )
    writes = OutputParam("canvas", description="the grid, and how it is made")

    def made(self, components, values):
        return checked_canvas(components.transformer, components.vqvae, values.height, values.width, values.overlap)


class DnDCompletionStep(DnDBlock):
    """An image at the top left to the `hole` beside and below it."""

    description = "Keeps an image that is smaller than what is made: what is to the right of it and below is the hole."
    components = (VQVAE,)
    reads: tuple[InputParam, ...] = (
        *(_passed("canvas"), _passed("conditions")),
        InputParam("image", required=True, description="one, or one for each label or prompt"),
        InputParam("mask_ring", int, default=1, description="so many cells around the hole are sampled too"),
        InputParam("feather", int, default=0, description="so many pixels around the hole are blended"),
        NUM_IMAGES,
    )
    writes = OutputParam("hole", description="what of the image is kept")

    def made(self, components, values):
        sizes = values.mask_ring, values.feather
        check_inpainting(values.image, values["mask_image"], *sizes, 1, values.canvas.larger, has_vqvae=True)
        num_images = whole_number("num_images_per_label", values.num_images_per_label)
        return hole_in(values.image, values["mask_image"], values.canvas, *sizes, len(values.conditions), num_images)


class DnDInpaintingStep(DnDCompletionStep):
    """An image and a mask to the `hole`."""

    description = "Keeps the parts of an image that are not masked."
    reads = (*DnDCompletionStep.reads, InputParam("mask_image", required=True, description="white: the hole"))


class DnDAutoImageStep(AutoPipelineBlocks):
    """Inpainting where there is a mask, completion where there is only an image, and nothing without one."""

    model_name = "dnd"
    block_classes = [DnDInpaintingStep, DnDCompletionStep]
    block_names = ["inpainting", "completion"]
    block_trigger_inputs = ["mask_image", "image"]

    @property
    def description(self) -> str:
        return "Keeps an image, or parts of it, where one is given."


class DnDSampleStep(DnDBlock):
    """Conditions to `codes`, `(n, height, width, depth)`."""

    description = "Samples the codes; those of the image around a hole stay."
    components = (TRANSFORMER, VQVAE)
    reads = (
        *(_passed("conditions"), _passed("canvas")),
        InputParam("hole", description="of an earlier block; None: all codes are sampled"),
        NUM_IMAGES,
        InputParam("num_particles", int, default=1, description="continuations of each image, for what comes after"),
        InputParam("generator", description="one, or one for each image; integers are seeds"),
        *(InputParam(name, description="None: what the checkpoint says") for name in SETTINGS),
        InputParam("positions_per_pass", int | str, default="auto", description="the same codes in fewer passes"),
        InputParam("callback_on_step_end", description="called after each position of the grid"),
        InputParam("callback_on_step_end_tensor_inputs", list[str], default=CALLBACK_TENSORS),
    )
    writes = OutputParam("codes", torch.Tensor, "`(n, height, width, depth)` int64")
    progress_bar = LoopSequentialPipelineBlocks.progress_bar
    set_progress_bar_config = LoopSequentialPipelineBlocks.set_progress_bar_config

    def made(self, components, values):
        transformer, canvas = components.transformer, values.canvas
        check_inpainting(values.hole, None, 0, 0, values.num_particles, canvas.larger, has_vqvae=True)
        tensor_inputs = checked_tensor_inputs(values.callback_on_step_end, values.callback_on_step_end_tensor_inputs)
        num_images = whole_number("num_images_per_label", values.num_images_per_label)
        conditions = values.conditions.repeat_interleave(num_images, dim=0)
        settings = {name: values[name] for name in SETTINGS}
        SamplingSettings.resolve(transformer.config, transformer.generation_config, **settings)
        check_positions_per_pass(values.positions_per_pass, values.num_particles, transformer)
        settings["generator"] = checked_generators(values.generator, len(conditions))
        components._interrupt = False
        with self.progress_bar(total=canvas.grid_size[0] * canvas.grid_size[1]) as progress:
            callback = step_function(values.callback_on_step_end, tensor_inputs, components, progress)
            options = dict(canvas=canvas, hole=values.hole, num_particles=values.num_particles, callback=callback)
            options["positions_per_pass"] = values.positions_per_pass
            return sample_codes(transformer, components.vqvae, conditions, **options, **settings)


class DnDDecodeStep(DnDBlock):
    """Codes to `images`."""

    description = "Decodes the codes, and puts the pixels of the image around the hole."
    components = (VQVAE, IMAGE_PROCESSOR)
    reads = (
        *(_passed("codes"), _passed("canvas")),
        InputParam("hole", description="of an earlier block"),
        InputParam("output_type", str, default="pil", description='"pil", "np", "pt" or "codes"'),
    )
    writes = OutputParam("images", description="of the output type")

    def made(self, components, values):
        check_output_type(values.output_type, has_vqvae=True)
        if values.output_type == "codes":
            return values.codes
        models = components.vqvae, components.image_processor
        return decoded(*models, values.codes, values.canvas, values.hole, values.output_type)


class DnDBlocks(SequentialPipelineBlocks):
    """All steps: images of labels or prompts, completion, inpainting, and larger images of each of them."""

    model_name = "dnd"
    block_classes = [DnDConditionStep, DnDCanvasStep, DnDAutoImageStep, DnDSampleStep, DnDDecodeStep]
    block_names = ["conditions", "canvas", "image", "sample", "decode"]
    _workflow_map = {
        "label": {"class_labels": True},
        "prompt": {"prompt": True},
        "completion": {"image": True},
        "inpainting": {"image": True, "mask_image": True},
    }

    @property
    def description(self) -> str:
        return "Makes images of labels or prompts, goes on from images, and fills in parts of them."

    def init_pipeline(
        self, pretrained_model_name_or_path: str | os.PathLike | None = None, **kwargs: Any
    ) -> "DnDModularPipeline":
        """A pipeline of these blocks; arguments as in diffusers."""
        return DnDModularPipeline(deepcopy(self), pretrained_model_name_or_path, **kwargs)


class DnDModularPipeline(ModularPipeline):
    """A `ModularPipeline` of blocks of this file, or of others with the same components.

    It loads from the folders of a [`DnDPipeline`], and from its own. As in diffusers, `from_pretrained` reads what
    there is, and `load_components` loads it, here in float32 unless a `dtype` is given.

    Args:
        blocks: `None`: [`DnDBlocks`].
        pretrained_model_name_or_path: a folder or a Hub id; `None`: the models come by `update_components`.
        kwargs: as in diffusers.
    """

    default_blocks_name = "DnDBlocks"

    def __init__(
        self,
        blocks: ModularPipelineBlocks | None = None,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        **kwargs: Any,
    ):
        super().__init__(DnDBlocks() if blocks is None else blocks, pretrained_model_name_or_path, **kwargs)
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "DnDModularPipeline":
        """A pipeline of [`DnDBlocks`] for the models of a folder or Hub id; arguments as in diffusers."""
        return cls(None, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _load_pipeline_config(cls, pretrained_model_name_or_path, **kwargs):
        modular, standard = super()._load_pipeline_config(pretrained_model_name_or_path, **kwargs)
        if standard is not None:  # the classes of the package, not the code in the folder
            loaded = cast(dict, DnDPipeline.load_config(pretrained_model_name_or_path, **kwargs))
            standard = {name: value for name, value in loaded.items() if value != [None, None]}
        return modular, standard

    def load_components(self, names: list[str] | str | None = None, workflow: str | None = None, **kwargs: Any) -> None:
        """Loads the models; arguments as in diffusers."""
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", None)
        super().load_components(names, workflow, **kwargs)

    @property
    def interrupt(self) -> bool:
        """Whether the sampling was stopped: a callback sets `pipe._interrupt = True` to end it after its position."""
        return self._interrupt
