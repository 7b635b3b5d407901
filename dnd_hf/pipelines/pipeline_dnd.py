"""DnDPipeline: class labels in, pictures out."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import PreTrainedModel

from .saving import SavingMixin


OUTPUT_TYPES = ("pil", "np", "pt", "codes")


class DnDPipeline(SavingMixin, DiffusionPipeline):
    """Class-conditional image generation with the DnD-Transformer (arXiv 2410.01912).

    A saved pipeline holds the code it needs: `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads
    it too, and `DnDPipeline.from_pretrained(folder)` never runs that code.

    Args:
        transformer: a [`DnDForImageGeneration`].
        vqvae: the [`RQVAE`] whose codes it was trained on.

    Raises:
        ValueError: the two do not speak of the same codes.
    """

    model_cpu_offload_seq = "transformer->vqvae"
    _callback_tensor_inputs = ["codes"]

    def __init__(self, transformer: PreTrainedModel, vqvae: ModelMixin):
        super().__init__()
        for ours, theirs in (("vocab_size", "num_vq_embeddings"), ("code_depth", "code_depth")):
            expected, found = getattr(transformer.config, ours), vqvae.config[theirs]
            if expected != found:
                raise ValueError(
                    f"`transformer` has `{ours}` {expected}, `vqvae` has `{theirs}` {found}: must be equal."
                )
        self.register_modules(transformer=transformer, vqvae=vqvae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=vqvae.stride)

    @property
    def labels(self) -> dict[str, int]:
        """Class names and their ids; a name such as "tench, Tinca tinca" also counts for each of its parts."""
        labels = {}
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
                near = get_close_matches(name, labels, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`pipe.labels` lists them."
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
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DnDPipeline", int, int, dict], dict | None] | None = None,
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Makes `num_images_per_label` pictures of each label, those of one label side by side.

        Args:
            class_labels: ids in `[0, num_classes)` or names, one or several; may be left out where there is one class.
            num_images_per_label: at least 1.
            guidance_scale, temperature, top_k, top_p, guidance_schedule, guidance_power: see
                [`DnDForImageGeneration.generate`]; `None`: what the checkpoint's `generation_config.json` says.
            generator: one, or a list of one an image; image i then depends on its own generator alone.
            output_type: `"pil"`, `"np"` (float `(n, H, W, 3)` in [0, 1]), `"pt"` (float `(n, 3, H, W)` in [0, 1]) or
                `"codes"` (int64 `(n, height, width, depth)`).
            return_dict: whether to return an `ImagePipelineOutput` or the tuple `(images,)`.
            callback_on_step_end: called as `callback(pipe, step, step, {"codes": codes so far})` after each of the
                `height * width` grid positions.

        Raises:
            ValueError: an argument out of its range; nothing has been computed then.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        if not isinstance(num_images_per_label, int) or num_images_per_label < 1:
            raise ValueError(
                f"`num_images_per_label` must be a whole number, at least 1, got {num_images_per_label!r}."
            )
        ids = torch.tensor(self._label_ids(class_labels), device=self._execution_device)
        ids = ids.repeat_interleave(num_images_per_label)

        with self.progress_bar(total=self.transformer.config.sequence_length) as progress:

            def on_step(step: int, codes: Tensor) -> None:
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, step, {"codes": codes})
                progress.update()

            codes = self.transformer.generate(
                ids,
                guidance_scale=guidance_scale,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                generator=generator,
                guidance_schedule=guidance_schedule,
                guidance_power=guidance_power,
                callback=on_step,
            )
        if output_type == "codes":
            images = codes
        else:
            samples = self.vqvae.decode_codes(codes).sample
            images = self.image_processor.postprocess(samples, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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
