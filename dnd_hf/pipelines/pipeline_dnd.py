"""DnDPipeline: class labels or prompts in, images out."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation.noise import checked_generators
from ..generation.settings import SamplingSettings
from ..ops.number_checks import whole_number
from .callbacks import CALLBACK_TENSORS, StepCallback, checked_tensor_inputs, step_function
from .candidates import Rank, best_of, check_candidates
from .conditions import ids_of_names, named_labels, read_conditions
from .inpainting import check_inpainting, hole_in
from .likelihood import LikelihoodMixin
from .outpainting import checked_canvas
from .sampling import check_output_type, check_positions_per_pass, decoded, sample_codes
from .saving import SavingMixin
from .streaming import StreamingMixin


class DnDPipeline(SavingMixin, LikelihoodMixin, StreamingMixin, DiffusionPipeline):
    """Class-conditional image generation with the DnD-Transformer (arXiv 2410.01912).

    A saved pipeline holds the code it needs: `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads
    it too, and `DnDPipeline.from_pretrained(folder)` never runs that code.

    Args:
        transformer: a [`DnDForImageGeneration`] or [`RQTransformerForImageGeneration`].
        vqvae: the [`RQVAE`] whose codes it was trained on; `None`: codes are all that the pipeline makes.
        tokenizer: of prompts, for a transformer that reads text.

    Raises:
        ValueError: the codes of the one are not those of the other.
    """

    model_cpu_offload_seq = "transformer->vqvae"
    _optional_components = ["vqvae", "tokenizer"]
    _callback_tensor_inputs = list(CALLBACK_TENSORS)

    def __init__(
        self,
        transformer: PreTrainedModel,
        vqvae: ModelMixin | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vqvae=vqvae, tokenizer=tokenizer)
        self._interrupt = False
        if vqvae is None:
            return
        for ours, theirs in (("vocab_size", "num_vq_embeddings"), ("code_depth", "code_depth")):
            expected, found = getattr(transformer.config, ours), vqvae.config[theirs]
            if expected != found:
                raise ValueError(
                    f"`transformer` has `{ours}` {expected}, `vqvae` has `{theirs}` {found}: must be equal."
                )
        if hasattr(transformer, "check_code_vectors"):
            transformer.check_code_vectors(vqvae.quantizer.codebooks)
        self.image_processor = VaeImageProcessor(vae_scale_factor=vqvae.stride)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "DnDPipeline":
        """A pipeline of the same models, as in diffusers: they are shared, and become float32 unless `dtype` is given.

        Args:
            pipeline: another pipeline of a `transformer` and a `vqvae`.
            kwargs: `dtype`, and models that take the place of the pipeline's.
        """
        # diffusers takes over a model only if the signature names its very class.
        names = [name for name in ("transformer", "vqvae", "tokenizer") if name not in kwargs]
        shared = {name: pipeline.components.get(name) for name in names}
        return super().from_pipe(pipeline, **shared, **kwargs)

    @property
    def interrupt(self) -> bool:
        """Whether the sampling was stopped: a callback sets `pipe._interrupt = True` to end it after its position."""
        return self._interrupt

    @property
    def labels(self) -> dict[str, int]:
        """Class names and their ids; a name such as "tench, Tinca tinca" also counts for each of its parts."""
        return named_labels(self.transformer.config)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The ids of class names.

        Raises:
            ValueError: a name is unknown; the message proposes near ones.
        """
        return ids_of_names(self.transformer.config, label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images_per_label: int = 1,
        guidance_scale: float | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        generator: torch.Generator | int | Sequence[torch.Generator | int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        mask_ring: int = 1,
        feather: int = 0,
        num_particles: int = 1,
        num_candidates: int = 1,
        rank_by: Rank | None = None,
        height: int | None = None,
        width: int | None = None,
        overlap: int | tuple[int, int] | None = None,
        positions_per_pass: int | str = "auto",
    ) -> ImagePipelineOutput | tuple:
        """Makes `num_images_per_label` images of each label or prompt, those of one label side by side.

        Args:
            class_labels: ids in `[0, num_classes)` or names, one or several; may be left out where there is one class.
                For a transformer that reads text, token ids `(n, prompt_length)`, or a `prompt` instead.
            num_images_per_label: at least 1.
            guidance_scale, temperature, top_k, top_p, guidance_schedule, guidance_power: see
                [`DnDForImageGeneration.generate`]; `None`: what the checkpoint's `generation_config.json` says.
            generator: one, or a list of one per image; image i then depends only on its own generator. An integer is
                the seed of a new one.
            output_type: `"pil"`, `"np"` (float `(n, H, W, 3)` in [0, 1]), `"pt"` (float `(n, 3, H, W)` in [0, 1]) or
                `"codes"` (int64 `(n, height, width, depth)`).
            return_dict: whether to return an `ImagePipelineOutput` or the tuple `(images,)`.
            callback_on_step_end: called as `callback(pipe, step, step, tensors)` after each position of the grid. It
                may look at the codes but not replace them: the next position has already read them. Where it sets
                `pipe._interrupt = True`, the sampling ends, and the images are made of the codes so far, the others
                being 0. With candidates the codes are those of all: every image, then every image again.
            callback_on_step_end_tensor_inputs: which tensors it gets; `"codes"`, a copy of the codes so far, or none.
            prompt: text, one or several, for a transformer that reads text, by the pipeline's `tokenizer`. What is
                longer than `prompt_length` tokens is cut, with a warning.
            image: fill in a part of it, or go on from it: one for all labels, or one for each, see [`image_tensor`] for
                the types. Its pixels stay as they are, but for those under the mask. Without a mask it is smaller than
                what is made, stands at the top left, and what is to the right of it and below is made.
            mask_image: one or several as well, of the size that is made, white where the image is to be filled, see
                [`mask_tensor`]. The codes of all cells with such a pixel are sampled; the other cells keep those of the
                image, whose encoder sees nothing of the hole, see [`known_box`].
            mask_ring: so many cells around them are sampled too: their codes would be others without the hole.
            feather: so many pixels around the mask are blended from the image to what the model made.
            num_particles: continuations of each image, weighted by what they say of the kept codes that come after
                them, see [`inpaint`]; 1: each code is sampled from what comes before it, and no more.
            num_candidates: for each image so many are made, and the best is returned. The first candidate is the image
                that comes without candidates; with one generator for all images that holds for generators on the CPU.
            rank_by: `"likelihood"` (the default): the probability of the codes under the condition. `"guidance"`: that
                divided by their probability under none. Or a function that is called with a list of PIL images and the
                list of their class ids, or prompts, and returns a number for each: the highest is the best, and of
                equal ones the first.
            height, width: of the images, in pixels: multiples of a cell's, at least the model's own, which are the
                default. Larger images are made in windows of the model's size, which overlap; a code knows only those
                before it in its window, see [`outpaint`]. The decoder, too, gets them in parts of the model's size.
            overlap: of these windows, in cells, at least: one number, or (rows, columns); `None`: half of the model's.
            positions_per_pass: how many positions of each image a pass computes from guesses: the same codes in fewer
                passes, see [`DnDForImageGeneration.generate`]. Particles go position by position.

        Raises:
            ValueError: an argument out of its range, nothing has been computed then; or codes that a callback changed.
        """
        # 1. Check the inputs
        has_vqvae, num_images = self.vqvae is not None, whole_number("num_images_per_label", num_images_per_label)
        check_output_type(output_type, has_vqvae)
        tensor_inputs = checked_tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        rank_by = check_candidates(num_candidates, rank_by, self.transformer, has_vqvae)
        canvas, hole = checked_canvas(self.transformer, self.vqvae, height, width, overlap), None
        check_inpainting(image, mask_image, mask_ring, feather, num_particles, canvas.larger, has_vqvae)
        conditions = read_conditions(self.transformer, self.tokenizer, class_labels, prompt)
        if image is not None:
            hole = hole_in(image, mask_image, canvas, mask_ring, feather, len(conditions), num_images)
        conditions = conditions.to(self._execution_device).repeat_interleave(num_images, dim=0)
        generator = checked_generators(generator, len(conditions))
        check_positions_per_pass(positions_per_pass, num_particles, self.transformer)
        settings: dict[str, Any] = dict(guidance_scale=guidance_scale, temperature=temperature, top_k=top_k)
        settings |= dict(top_p=top_p, guidance_schedule=guidance_schedule, guidance_power=guidance_power)
        SamplingSettings.resolve(self.transformer.config, self.transformer.generation_config, **settings)

        # 2. Sample the codes, of all images for each candidate
        self._interrupt = False
        candidates = conditions.repeat(num_candidates, *[1] * (conditions.ndim - 1))
        settings["generator"] = generator * num_candidates if isinstance(generator, list) else generator
        with self.progress_bar(total=canvas.grid_size[0] * canvas.grid_size[1]) as progress:
            settings["callback"] = step_function(callback_on_step_end, tensor_inputs, self, progress)
            options: dict[str, Any] = dict(num_particles=num_particles, positions_per_pass=positions_per_pass)
            codes = sample_codes(self.transformer, self.vqvae, candidates, canvas, hole, **options, **settings)

        # 3. Choose the best candidates
        def decode(codes: Tensor, output_type: str = "pil"):
            return decoded(self.vqvae, self.image_processor, codes, canvas, hole, output_type)

        if num_candidates > 1:
            labels = [prompt] if isinstance(prompt, str) else prompt or conditions.tolist()
            codes = best_of(codes, num_candidates, rank_by, self.transformer, candidates, overlap, labels, decode)

        # 4. Decode them
        images = codes if output_type == "codes" else decode(codes, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
