"""DnDPipeline: class labels or prompts in, images out."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation.noise import checked_generators
from ..generation.settings import SamplingSettings
from ..ops.number_checks import whole_number
from .callbacks import CALLBACK_TENSORS, StepCallback, call_after_step, checked_tensor_inputs
from .candidates import Rank, best_candidates, candidate_scores, check_candidates, checked_scores
from .inpainting import Hole, check_inpainting, hole_in
from .likelihood import LikelihoodMixin
from .prompts import prompt_tokens
from .saving import SavingMixin
from .streaming import StreamingMixin


OUTPUT_TYPES = ("pil", "np", "pt", "codes")


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
        labels: dict[str, int] = {}
        for index, name in sorted(self.transformer.config.id2label.items()):
            for part in (name, *name.split(",")):
                labels.setdefault(part.strip(), index)
        return labels

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The ids of class names.

        Raises:
            ValueError: a name is unknown; the message proposes near ones.
        """
        labels, ids = self.labels, []
        for name in [label] if isinstance(label, str) else label:
            if name not in labels:
                known = {one.lower(): one for one in labels}
                near = [known[one] for one in get_close_matches(name.lower(), known, n=3, cutoff=0.5)]
                few = ", ".join(map(repr, labels)) if len(labels) <= 20 else "`pipe.labels` lists them"
                hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"{few}."
                raise ValueError(f"`class_labels` must be names of this model's classes, got {name!r}: {hint}")
            ids.append(labels[name])
        return ids

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
            callback_on_step_end: called as `callback(pipe, step, step, tensors)` after each of the `height * width`
                grid positions. It may look at the codes but not replace them: the next position has already read them.
                Where it sets `pipe._interrupt = True`, the sampling ends, and the images are made of the codes so far,
                the others being 0. With candidates the codes are those of all: every image, then every image again.
            callback_on_step_end_tensor_inputs: which tensors it gets; `"codes"`, a copy of the codes so far, or none.
            prompt: text, one or several, for a transformer that reads text, by the pipeline's `tokenizer`. What is
                longer than `prompt_length` tokens is cut, with a warning.
            image: fill in a part of it; one for all labels, or one for each, of the model's size, see [`image_tensor`]
                for the types. The pixels outside of the mask stay as they are.
            mask_image: likewise, white where the image is to be filled, see [`mask_tensor`]. The codes of all cells
                with such a pixel are sampled; the other cells keep those of the image, its hole having the mean colour.
            mask_ring: so many cells around them are sampled too: their codes saw the hole through the encoder.
            feather: so many pixels around the mask are blended from the image to what the model made.
            num_particles: continuations of each image, weighted by what they say of the kept codes that come after
                them, see [`inpaint`]; 1: each code is sampled from what comes before it, and no more.
            num_candidates: for each image so many are made, and the best is returned. The first candidate is the image
                that comes without candidates; with one generator for all images that holds for generators on the CPU.
            rank_by: `"likelihood"` (the default): the probability of the codes under the condition. `"guidance"`: that
                divided by their probability under none. Or a function that is called with a list of PIL images and the
                list of their class ids, or prompts, and returns a number for each: the highest is the best, and of
                equal ones the first.

        Raises:
            ValueError: an argument out of its range, nothing has been computed then; or codes that a callback changed.
        """
        # 1. Check the inputs
        self.check_inputs(num_images_per_label, output_type)
        tensor_inputs = checked_tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        rank_by = check_candidates(num_candidates, rank_by, self.transformer, self.vqvae is not None)
        check_inpainting(image, mask_image, mask_ring, feather, num_particles)
        conditions, hole = self._conditions(class_labels, prompt).to(self._execution_device), None
        if image is not None:
            sizes = (self._checked_images(image, "image"), mask_image, self.vqvae.code_stride, mask_ring, feather)
            hole = hole_in(*sizes, len(conditions), int(num_images_per_label))
        conditions = conditions.repeat_interleave(int(num_images_per_label), dim=0)
        generator = checked_generators(generator, len(conditions))
        settings: dict[str, Any] = dict(guidance_scale=guidance_scale, temperature=temperature, top_k=top_k)
        settings |= dict(top_p=top_p, guidance_schedule=guidance_schedule, guidance_power=guidance_power)
        SamplingSettings.resolve(self.transformer.config, self.transformer.generation_config, **settings)

        # 2. Sample the codes, of all images for each candidate
        self._interrupt = False
        candidates = conditions.repeat(num_candidates, *[1] * (conditions.ndim - 1))
        settings["generator"] = generator * num_candidates if isinstance(generator, list) else generator
        with self.progress_bar(total=self.transformer.config.sequence_length) as progress:

            def on_step(step: int, codes: Tensor) -> bool:
                ended = call_after_step(callback_on_step_end, tensor_inputs, self, step, codes)
                progress.update()
                return ended

            codes = self._sample(candidates, hole, num_particles, callback=on_step, **settings)

        # 3. Choose the best candidates
        if num_candidates > 1:
            if callable(rank_by):
                labels = [prompt] if isinstance(prompt, str) else prompt or conditions.tolist()
                labels = [labels[i // (len(conditions) // len(labels))] for i in range(len(conditions))]
                ranks = rank_by(self._decoded(codes, hole, "pil"), labels * num_candidates)
                scores = checked_scores(ranks, len(codes), codes.device)
            else:
                scores = candidate_scores(rank_by, self.transformer, candidates, codes)
            codes = codes[best_candidates(scores, num_candidates)]

        # 4. Decode them
        images = codes if output_type == "codes" else self._decoded(codes, hole, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample(self, conditions: Tensor, hole: Hole | None, num_particles: int, **settings) -> Tensor:
        """Codes of images, where there is a hole beside those that are kept."""
        if hole is None:
            return self.transformer.generate(conditions, **settings)
        codes = self._encode(hole.visible, batch_size=64)
        codes_mask = hole.codes_mask(codes.shape[-1]).to(codes.device)
        times = len(conditions) // len(codes)
        given = dict(codes=codes.repeat(times, 1, 1, 1), codes_mask=codes_mask.repeat(times, 1, 1, 1))
        if num_particles == 1:
            return self.transformer.generate(conditions, **given, **settings)
        return self.transformer.inpaint(conditions, **given, num_particles=num_particles, **settings)

    def _decoded(self, codes: Tensor, hole: Hole | None, output_type: str):
        """The images of codes, with the user's pixels around a hole."""
        sample = self.vqvae.decode_codes(codes).sample
        if hole is not None:
            sample = hole.composited(sample)
        return self.image_processor.postprocess(sample, output_type=output_type)

    def check_inputs(self, num_images_per_label: int, output_type: str) -> None:
        """Raises a ValueError for an argument of `__call__` that it does not pass on."""
        allowed = OUTPUT_TYPES if self.vqvae is not None else ("codes",)
        if output_type not in allowed:
            without = "" if self.vqvae is not None else " of a pipeline without a `vqvae`"
            raise ValueError(f"`output_type`{without} must be one of {allowed}, got {output_type!r}.")
        whole_number("num_images_per_label", num_images_per_label)

    def _conditions(self, class_labels, prompt: str | Sequence[str] | None) -> Tensor:
        """`(n,)` class labels, or `(n, prompt_length)` text tokens."""
        if prompt is not None and class_labels is not None:
            raise ValueError("`prompt` and `class_labels` must not both be given.")
        length = getattr(self.transformer.config, "prompt_length", 0)
        if prompt is not None:
            return prompt_tokens(self.tokenizer, prompt, length)
        if not length:
            return torch.tensor(self._label_ids(class_labels))
        if class_labels is None:
            raise ValueError("`prompt` must be given: this model reads text.")
        return self.transformer.check_conditions(class_labels)

    def _label_ids(self, class_labels) -> list[int]:
        num_classes = self.transformer.config.num_classes
        if class_labels is None:
            if num_classes > 1:
                raise ValueError(f"`class_labels` must be given: this model has {num_classes} classes.")
            class_labels = 0
        if hasattr(class_labels, "tolist"):  # tensors and arrays
            class_labels = class_labels.tolist()
        if isinstance(class_labels, (int, float, str)):
            class_labels = [class_labels]
        class_labels = [label.item() if hasattr(label, "item") else label for label in class_labels]
        ids = [self.get_label_ids(label)[0] if isinstance(label, str) else label for label in class_labels]
        wrong = [label for label in ids if isinstance(label, bool) or not isinstance(label, int)]
        wrong = wrong or [label for label in ids if not 0 <= label < num_classes]
        if wrong or not ids:
            raise ValueError(f"`class_labels` must be names or integers in [0, {num_classes}), got {wrong or ids}.")
        return ids
