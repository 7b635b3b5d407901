"""DnDPipeline: class labels in, pictures out."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import file_exists
from torch import Tensor
from transformers import PreTrainedModel

from .remote_code import portable_source


COMPONENTS = {"transformer": ("modeling_dnd", "DnDForImageGeneration"), "vqvae": ("autoencoder_rqvae", "RQVAE")}
OUTPUT_TYPES = ("pil", "np", "pt", "codes")


def model_card(name: str) -> str:
    """The model card of a pipeline of which no more is known: what it is, and how to use it."""
    return "\n".join(  # lines, because a saved pipeline holds this code with another indentation
        (
            "---",
            "library_name: diffusers",
            "pipeline_tag: unconditional-image-generation",
            "tags:",
            "- dnd-transformer",
            "- class-conditional-image-generation",
            "---",
            "",
            f"# {name}",
            "",
            "A DnD-Transformer ([arXiv 2410.01912](https://arxiv.org/abs/2410.01912)): class labels in, pictures out.",
            "",
            "```python",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)',
            "pipe.labels  # names and ids of its classes",
            'pipe(0).images[0].save("picture.png")',
            "```",
            "",
            f'With dnd_hf installed, `dnd_hf.DnDPipeline.from_pretrained("{name}")` runs no code of this repository.',
            "",
        )
    )


class DnDPipeline(DiffusionPipeline):
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "DnDPipeline":
        """Loads a pipeline from a folder or a Hub id, as any pipeline of diffusers.

        Both models are loaded in float32 unless `dtype` (or `torch_dtype`) says otherwise, whatever they are stored
        in; the codebooks always are.

        Raises:
            ValueError: the folder is not a pipeline of this class.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_file() or (folder.is_dir() and not (folder / cls.config_name).is_file()):
            raise ValueError(
                f"`pretrained_model_name_or_path` must be a pipeline folder with a {cls.config_name}, got {folder}."
            )
        if kwargs.get("dtype", kwargs.get("torch_dtype")) is None:
            kwargs.pop("torch_dtype", None)
            kwargs["dtype"] = torch.float32
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        index = super()._dict_from_json_file(json_file)
        name = index.get("_class_name")
        name = name[-1] if isinstance(name, list) else name
        if name != "DnDPipeline":
            raise ValueError(f"`pretrained_model_name_or_path` must hold a DnDPipeline, {json_file} is of {name}.")
        return {**index, "_class_name": name}  # as a list it would ask for the code in the folder

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict | tuple:
        # Not the code in the folder, but this package (or the code that this class itself was loaded from).
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for component, (module, class_name) in COMPONENTS.items():
            package = "dnd_hf.models" if __package__ == "dnd_hf.pipelines" else __package__
            config[component] = [import_module(f"{package}.{module}").__name__, class_name]
        return loaded

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json` and the code that `trust_remote_code` needs; called by `save_pretrained`."""
        super().save_config(save_directory)
        index_file = Path(save_directory, self.config_name)
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["_class_name"] = ["pipeline", type(self).__name__]
        Path(save_directory, "pipeline.py").write_text(portable_source(type(self)), encoding="utf-8")
        for component, (module, _) in COMPONENTS.items():
            model = getattr(self, component)
            model_class = type(getattr(model, "_orig_mod", model))  # of a compiled module, the original
            index[component] = [module, model_class.__name__]
            code_file = Path(save_directory, component, f"{module}.py")
            code_file.parent.mkdir(exist_ok=True)
            code_file.write_text(portable_source(model_class), encoding="utf-8")
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in (index_file, Path(save_directory, "vqvae", "config.json")):
            if file.is_file():  # diffusers writes which local path a model was loaded from
                kept = {k: v for k, v in json.loads(file.read_text(encoding="utf-8")).items() if k != "_name_or_path"}
                file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _upload_folder(
        self, working_dir: str | os.PathLike, repo_id: str, token: str | None = None, subfolder: str | None = None, **kw
    ):
        # Called by `push_to_hub`, which keeps the card of the repository and, where there is none, writes an empty one.
        # The card of the folder that the pipeline was loaded from takes its place, with its pictures.
        if subfolder is None and not file_exists(repo_id, "README.md", token=token):
            target, source = Path(working_dir), Path(self.name_or_path or working_dir)
            (target / "README.md").write_text(model_card(repo_id), encoding="utf-8")
            if (source / "README.md").is_file() and source.resolve() != target.resolve():
                shutil.copyfile(source / "README.md", target / "README.md")
                text = (source / "README.md").read_text(encoding="utf-8")
                for picture in source.rglob("*.png"):
                    name = picture.relative_to(source)
                    if f"({name.as_posix()})" in text:
                        (target / name).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(picture, target / name)
        return super()._upload_folder(working_dir, repo_id, token=token, subfolder=subfolder, **kw)

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
