"""The configuration file of an RQ-VAE, config.yaml: read without trust, and written."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint_file import read_yaml, shown


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list(value: Any, is_item: Callable[[Any], bool], length: int | None = None) -> bool:
    return isinstance(value, list) and length in (None, len(value)) and all(map(is_item, value))


CONFIG_DEFAULTS = {"decay": 0.99, "restart_unused_codes": False, "latent_loss_weight": 0.25}
CONFIG_VALUES = {
    "hparams.embed_dim": _is_count,
    "hparams.n_embed": lambda value: _is_count(value) or _is_list(value, _is_count),
    "hparams.latent_shape": lambda value: _is_list(value, _is_count, 3),
    "hparams.code_shape": lambda value: _is_list(value, _is_count, 3),
    "hparams.shared_codebook": lambda value: isinstance(value, bool),
    "hparams.decay": lambda value: _is_number(value) or _is_list(value, _is_number),
    "hparams.restart_unused_codes": lambda value: isinstance(value, bool),
    "hparams.latent_loss_weight": _is_number,
    "ddconfig.ch": _is_count,
    "ddconfig.ch_mult": lambda value: _is_list(value, _is_count) and len(value) > 0,
    "ddconfig.num_res_blocks": _is_count,
    "ddconfig.attn_resolutions": lambda value: _is_list(value, _is_count),
    "ddconfig.z_channels": _is_count,
    "ddconfig.resolution": _is_count,
}
"""What the configuration file must say, and whether a value can be that."""


def read_rqvae_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`arch.hparams` and `arch.ddconfig` of a configuration file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is larger than any, no plain YAML, of another kind of model, or says what no model can have.
    """
    if not path.is_file():
        raise FileNotFoundError(f"An RQ-VAE needs its config.yaml, beside the checkpoint or named: none at {path}.")
    content = read_yaml(path)
    try:
        arch = content["arch"]
        hparams, ddconfig = dict(arch["hparams"]), dict(arch["ddconfig"])
        kind = (arch.get("type", "rq-vae"), hparams.get("bottleneck_type", "rq"))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be YAML with `arch.hparams` and `arch.ddconfig`, it is not.") from error
    if kind != ("rq-vae", "rq"):
        raise ValueError(f"{path} must be of type `rq-vae` with bottleneck `rq`, got {shown(kind)}.")
    parts = {"hparams": hparams, "ddconfig": ddconfig}
    for name, expected in CONFIG_VALUES.items():
        part, key = name.split(".")
        value = parts[part].get(key, CONFIG_DEFAULTS.get(key))
        if value is None:
            raise ValueError(f"{path} must have `{name}` under `arch`, it does not.")
        if not expected(value):
            raise ValueError(f"`{name}` of {path} must not be {shown(value)}.")
        parts[part][key] = value
    return hparams, ddconfig


def original_rqvae_config(config: dict[str, Any], attention: list[bool]) -> dict[str, Any]:
    """`arch` of the configuration file of an [`RQVAE`]'s `config`; `attention`: which levels have it."""
    channels, levels = config["block_out_channels"], len(attention)
    stride, size = 2 ** (levels - 1), config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    cells, patch = (height // stride, width // stride), config["code_patch_size"]
    embed_dim = config["vq_embed_dim"] or config["latent_channels"]
    hparams = dict(
        bottleneck_type="rq",
        embed_dim=embed_dim,
        n_embed=config["num_vq_embeddings"],
        latent_shape=[*cells, embed_dim],
        code_shape=[cells[0] // patch[0], cells[1] // patch[1], config["code_depth"]],
        shared_codebook=config["shared_codebook"],
        decay=config["ema_decay"],
        restart_unused_codes=config["restart_unused_codes"],
        loss_type="mse",
        latent_loss_weight=config["commitment_weight"],
    )
    ddconfig = dict(
        double_z=False,
        z_channels=config["latent_channels"],
        resolution=height,
        in_channels=config["in_channels"],
        out_ch=config["out_channels"],
        ch=channels[0],
        ch_mult=[count // channels[0] for count in channels],
        num_res_blocks=config["layers_per_block"],
        attn_resolutions=[height // 2**level for level in range(levels) if attention[level]],
        dropout=0.0,
    )
    return dict(type="rq-vae", code_hier=1, checkpointing=False, hparams=hparams, ddconfig=ddconfig)
