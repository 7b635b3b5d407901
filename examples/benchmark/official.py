"""The official code, github.com/chenllliang/DnD-Transformer, with the weights of our models."""

import contextlib
import importlib
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dnd_hf import RQVAE, DnDForImageGeneration
from dnd_hf.conversion import export_original


Loss = Callable[[Tensor, Tensor], Tensor]
"""The loss of labels (batch,) and codes (batch, rows, columns, depth)."""


class Reference:
    """A checkout of the official repository.

    Args:
        folder: of the checkout; its modules are imported.
    """

    def __init__(self, folder: str):
        source = Path(folder, "src")
        torch.backends.cuda.sdp_kernel = lambda **_: contextlib.nullcontext()  # gone from PyTorch
        for name, path in (("rqvae", ""), ("rqvae.models", "models")):  # without what their __init__ imports
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(source / "rqvae" / path)]
        sys.path.insert(0, str(source / "dnd_transformer"))
        self.rqvae = importlib.import_module("rqvae.models.rqvae.rqvae")
        self.quantizations = importlib.import_module("rqvae.models.rqvae.quantizations")
        self.gpt = importlib.import_module("gpt_multitoken_v3")
        self.generate = importlib.import_module("generate_multitoken_v3").generate

    def transformer(self, model: DnDForImageGeneration) -> nn.Module:
        """The official transformer with the weights of ours, in evaluation mode."""
        config = model.config
        sizes = dict(
            dim=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            num_classes=config.num_classes,
            vocab_size=config.vocab_size,
            block_size=config.sequence_length,
            num_pred_heads=config.code_depth,
            pred_head_positions=list(config.prediction_layers),
            class_dropout_prob=config.class_dropout_prob,
        )
        official = self.gpt.Transformer(self.gpt.ModelArgs(**sizes))
        return self._filled(official, model, "transformer.pt", "model")

    def training_loss(self, model: DnDForImageGeneration) -> tuple[nn.Module, Loss]:
        """The official transformer with the weights of ours, and the loss that its trainer takes."""
        official = self.transformer(model).to(model.device)

        def loss_of(labels: Tensor, codes: Tensor) -> Tensor:
            codes = codes.flatten(1, 2)
            return official(idx=codes[:, :-1], cond_idx=labels, targets=codes)[1]

        return official, loss_of

    def tokenizer(self, vae: RQVAE) -> nn.Module:
        """The official tokenizer with the weights of ours, in evaluation mode."""
        config, (rows, columns) = vae.config, vae.grid_size
        latents = [rows, columns, config.vq_embed_dim or config.latent_channels]
        widths, size = config.block_out_channels, config.sample_size
        official = self.rqvae.RQVAE(
            embed_dim=latents[2],
            n_embed=config.num_vq_embeddings,
            bottleneck_type="rq",
            latent_shape=latents,
            code_shape=[rows, columns, config.code_depth],
            shared_codebook=config.shared_codebook,
            restart_unused_codes=config.restart_unused_codes,
            ddconfig=dict(
                double_z=False,
                z_channels=config.latent_channels,
                resolution=size if isinstance(size, int) else size[0],
                in_channels=3,
                out_ch=3,
                ch=widths[0],
                ch_mult=[width // widths[0] for width in widths],
                num_res_blocks=config.layers_per_block,
                attn_resolutions=[rows],
                dropout=0.0,
            ),
        )
        return self._filled(official, vae, "rqvae.pt", "state_dict")

    @staticmethod
    def _filled(official: nn.Module, ours: nn.Module, file: str, key: str) -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            ours.save_pretrained(f"{folder}/ours")
            export_original(f"{folder}/ours", f"{folder}/official")
            official.load_state_dict(torch.load(f"{folder}/official/{file}")[key], strict=False)
        return official.eval()
