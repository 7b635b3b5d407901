"""The original RQ-Transformer, github.com/kakaobrain/rq-vae-transformer, with the weights of our models."""

import contextlib
import copy
import importlib
import sys
import tempfile
import types
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from official import Loss
from torch import Tensor, nn

from dnd_hf import RQTransformerForImageGeneration
from dnd_hf.conversion import export_original


class Settings(types.SimpleNamespace):
    """A nested configuration read by attributes, in place of omegaconf's."""

    def __init__(self, **values):
        super().__init__(**{k: Settings(**v) if isinstance(v, dict) else v for k, v in values.items()})

    def copy(self) -> "Settings":
        return copy.deepcopy(self)


class CodeVectors:
    """What the original asks of its tokenizer."""

    def __init__(self, code_vectors: Tensor):
        self.code_vectors = code_vectors

    def get_code_emb_with_depth(self, codes: Tensor) -> tuple[Tensor, None]:
        return F.embedding(codes, self.code_vectors[0]), None


class OriginalRQTransformer:
    """A checkout of the original repository.

    Args:
        folder: of the checkout; its modules are imported, under names that another checkout may have had before.
    """

    def __init__(self, folder: str):
        for name in [name for name in sys.modules if name.partition(".")[0] == "rqvae"]:
            del sys.modules[name]
        for name in ("rqvae", "rqvae.models", "rqvae.models.rqtransformer"):  # without what their __init__ imports
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(Path(folder, *name.split(".")))]
        configs = sys.modules["rqvae.models.rqtransformer.configs"] = types.ModuleType("configs")
        for name in ("RQTransformerConfig", "AttentionBlockConfig", "AttentionStackConfig"):
            setattr(configs, name, Settings)
        self.transformers = importlib.import_module("rqvae.models.rqtransformer.transformers")
        self.transformers.autocast = lambda enabled: contextlib.nullcontext()  # the caller's, on GPUs too

    def transformer(self, model: RQTransformerForImageGeneration) -> tuple[nn.Module, CodeVectors]:
        """The original with the weights of ours, in evaluation mode, and the code vectors that its calls take."""
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/ours")
            export_original(f"{folder}/ours", f"{folder}/original")
            stage2 = Path(folder, "original", "stage2")
            arch = yaml.safe_load((stage2 / "config.yaml").read_text())["arch"]
            original = self.transformers.RQTransformer(Settings(**arch))
            original.load_state_dict(torch.load(stage2 / "model.pt")["state_dict"])
        return original.eval(), CodeVectors(model.code_vectors)

    def training_loss(self, model: RQTransformerForImageGeneration) -> tuple[nn.Module, Loss]:
        """The original with the weights of ours, and its `compute_loss` with the codes as targets."""
        original, vectors = self.transformer(model)
        original.to(model.device)

        def loss_of(labels: Tensor, codes: Tensor) -> Tensor:
            return original.compute_loss(original(codes, vectors, cond=labels), codes)

        return original, loss_of
