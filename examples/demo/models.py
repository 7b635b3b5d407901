"""The models that the page offers: which ones, loaded when somebody chooses them, the last few kept."""

import re
import threading
from collections import OrderedDict
from pathlib import Path

import torch

from dnd_hf import DnDPipeline
from dnd_hf.bundled import checkpoint_path


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class Models:
    """Loads pipelines by name.

    Args:
        names: those that may be chosen: bundled ones, folders, ids of the Hub.
        allow_others: whether a visitor may name other ids of the Hub. Folders can never be named by a visitor, and no
            code of a repository is run.
        kept: how many loaded pipelines stay in memory.
        device, dtype: where and in which precision they run.

    Raises:
        ValueError: no name, or one that is given twice.
    """

    def __init__(
        self,
        names: list[str],
        allow_others: bool = False,
        kept: int = 2,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if not names or len(set(names)) != len(names):
            raise ValueError(f"`models` must be one or several different names, got {names}.")
        self.names, self.allow_others, self.kept = list(names), allow_others, kept
        self.device, self.dtype = device, dtype
        self._loaded: OrderedDict[str, DnDPipeline] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, name: str) -> str:
        """The name, if a visitor may have it.

        Raises:
            ValueError: it is not offered, or others are allowed and it is no id of the Hub.
        """
        if name in self.names:
            return name
        if not self.allow_others:
            raise ValueError(f"The model must be one of {', '.join(self.names)}, got {name!r}.")
        if not isinstance(name, str) or not HUB_ID.fullmatch(name) or ".." in name or Path(name).exists():
            raise ValueError(f"The model must be an id of the Hub such as owner/name, got {name!r}.")
        return name

    def get(self, name: str) -> DnDPipeline:
        """The pipeline of this name, loaded if it is not in memory.

        Raises:
            ValueError: see [`check`]; or what is there is no pipeline that makes images.
        """
        self.check(name)
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            self._loaded.move_to_end(name)
            while len(self._loaded) > self.kept:
                self._loaded.popitem(last=False)
            return self._loaded[name]

    def _load(self, name: str) -> DnDPipeline:
        try:
            pipe = DnDPipeline.from_pretrained(checkpoint_path(name), dtype=self.dtype, use_safetensors=True)
        except OSError as error:  # its message may name folders of the server
            raise ValueError(f"There is no model {name!r} that can be loaded from here.") from error
        if pipe.vqvae is None:
            raise ValueError(f"The model {name!r} has no `vqvae`, so it makes no images.")
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)


def reads_text(pipe: DnDPipeline) -> bool:
    """Whether the model is told what to make by a prompt."""
    return bool(getattr(pipe.transformer.config, "prompt_length", 0))


def label_choices(pipe: DnDPipeline) -> list[tuple[str, int]]:
    """Names and numbers of the classes, for a list to choose from; numbers only where the model has no names."""
    config = pipe.transformer.config
    names = config.id2label or {}
    unnamed = {i: f"LABEL_{i}" for i in range(config.num_classes)}  # what transformers calls them
    return [(f"{i}" if names.get(i, unnamed[i]) == unnamed[i] else names[i], i) for i in range(config.num_classes)]


def image_size(pipe: DnDPipeline) -> tuple[int, int]:
    """(height, width) of the model's images, pixels."""
    rows, columns = pipe.transformer.config.grid_size
    return rows * pipe.vqvae.code_stride[0], columns * pipe.vqvae.code_stride[1]
