"""How a pipeline is saved, published and loaded: with all the code it needs, which the installed package never runs."""

import json
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin
from diffusers.utils import PushToHubMixin
from huggingface_hub import file_exists
from torch import nn
from transformers import PreTrainedModel

from .model_cards import pipeline_card
from .remote_code import is_installed, remote_code


class SavingMixin(ConfigMixin, PushToHubMixin):
    """For a diffusers pipeline of a `transformer` and a `vqvae`, before `DiffusionPipeline`.

    A saved folder loads by `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` as well, and each of its
    models by the Auto classes of transformers and diffusers.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Loads a pipeline from a folder or a Hub id, as any pipeline of diffusers.

        Both models are loaded in float32 unless `dtype` (or `torch_dtype`) says otherwise, whatever they are stored
        in; the codebooks always are.

        Raises:
            ValueError: the folder is not a pipeline of this class, or a model's weights are missing or misshapen.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_file() or (folder.is_dir() and not (folder / cls.config_name).is_file()):
            raise ValueError(
                f"`pretrained_model_name_or_path` must be a pipeline folder with a {cls.config_name}, got {folder}."
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        index = super()._dict_from_json_file(json_file)
        name = index.get("_class_name")
        name = name[-1] if isinstance(name, list) else name
        if name != "DnDPipeline":
            raise ValueError(f"`pretrained_model_name_or_path` must hold a DnDPipeline, {json_file} is of {name}.")
        # With the list, diffusers would ask for the code in the folder.
        return {**index, "_class_name": name} if is_installed(cls) else index

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict | tuple:
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if is_installed(cls):  # the models of the package, not the code in the folder
            for component in ("transformer", "vqvae"):
                module, class_name = config[component]
                if module is not None:
                    config[component] = [_imported_module(module), class_name]
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Saves the models and the code that they need; arguments as in diffusers.

        Raises:
            ValueError: a model has unmerged PEFT layers; nothing has been written then.
        """
        self._refuse_adapters()
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, *args, **kwargs) -> str:
        """Saves to a repository of the Hub; arguments as in diffusers, errors as of `save_pretrained`."""
        self._refuse_adapters()  # before the repository is created
        return super().push_to_hub(*args, **kwargs)

    def _refuse_adapters(self) -> None:
        for name, model in self.components.items():
            if isinstance(model, nn.Module) and _has_adapters(model):
                raise ValueError(
                    f"`{name}` has unmerged PEFT layers, which a pipeline cannot be saved with: merge them first"
                    " (`merge_and_unload()` of a PeftModel), or save the adapter by itself."
                )

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json` and the code that `trust_remote_code` runs; called by `save_pretrained`."""
        super().save_config(save_directory)
        folder = Path(save_directory)
        (folder / "pipeline.py").write_text(remote_code(type(self)), encoding="utf-8")
        index: dict[str, Any] = {"_class_name": ["pipeline", type(self).__name__]}
        for name in ("transformer", "vqvae"):
            model = self.components[name]
            if model is None:
                continue
            model_class = type(getattr(model, "_orig_mod", model))  # of a compiled module, the original
            module = model_class.__module__.rpartition(".")[2]
            index[name] = [module, model_class.__name__]
            auto_map = {"AutoModel": f"{module}.{model_class.__name__}"}
            if issubclass(model_class, PreTrainedModel):
                config_class = model_class.config_class
                auto_map["AutoConfig"] = f"{module}.{config_class.__name__}"
                code = remote_code(model_class, config_class)
                # transformers looks for it here when it is given a `subfolder`.
                (folder / f"{module}.py").write_text(code, encoding="utf-8")
            else:
                code = remote_code(model_class)
                index["auto_map"] = auto_map  # diffusers looks for it here when it is given a `subfolder`
            (folder / name / f"{module}.py").write_text(code, encoding="utf-8")
            _update_json(folder / name / "config.json", auto_map=auto_map)
        _update_json(folder / self.config_name, **index)

    def _upload_folder(
        self, working_dir: str | os.PathLike, repo_id: str, token: str | None = None, subfolder: str | None = None, **kw
    ):
        # Called by `push_to_hub`, which keeps the card of the repository and, where there is none, writes an empty one.
        # The card of the folder that the pipeline was loaded from takes its place, with its images.
        if subfolder is None and not file_exists(repo_id, "README.md", token=token):
            target, source = Path(working_dir), Path(self.name_or_path or working_dir)
            config = self.transformer.config
            card = pipeline_card(repo_id, config.num_classes, config.model_type)
            (target / "README.md").write_text(card, encoding="utf-8")
            if (source / "README.md").is_file() and source.resolve() != target.resolve():
                _copy_card(source, target)
        return super()._upload_folder(working_dir, repo_id, token=token, subfolder=subfolder, **kw)


def _imported_module(name: str) -> str:
    """The full name of the module of this package that a folder means; diffusers wants it imported."""
    try:
        return import_module(f"dnd_hf.models.{name.rpartition('.')[2]}").__name__
    except ModuleNotFoundError as error:
        raise ValueError(f"`model_index.json` names the module {name!r}, which dnd_hf.models does not have.") from error


def _has_adapters(model: nn.Module) -> bool:
    peft = sys.modules.get("peft")  # whose layers no model has where it was never imported
    return peft is not None and any(
        isinstance(part, peft.tuners.tuners_utils.BaseTunerLayer) for part in model.modules()
    )


def _update_json(file: Path, **values) -> None:
    """Changes values of a JSON file, and leaves out the local path that diffusers notes there."""
    content = {**json.loads(file.read_text(encoding="utf-8")), **values}
    content.pop("_name_or_path", None)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_card(source: Path, target: Path) -> None:
    shutil.copyfile(source / "README.md", target / "README.md")
    text = (source / "README.md").read_text(encoding="utf-8")
    for image in source.rglob("*.png"):
        name = image.relative_to(source)
        if f"({name.as_posix()})" in text:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target / name)
