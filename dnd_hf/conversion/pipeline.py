"""Pipelines, a transformer with its tokenizer: from two official files to one folder, and back.

Weights are renamed and rearranged but never computed with, so the way back gives every tensor bit for bit.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from ..files import new_folder, read_json
from ..models.configuration_dnd import DnDConfig
from ..pipelines.pipeline_dnd import DnDPipeline
from .tokenizer import convert_rqvae, original_rqvae
from .transformer import agreed_grid, convert_transformer, original_transformer, read_transformer


def convert_pipeline(
    transformer_path: str | os.PathLike,
    rqvae_path: str | os.PathLike,
    rqvae_config: str | os.PathLike | None = None,
    rqvae_use_ema: bool = False,
    grid_size: int | Sequence[int] | None = None,
    use_ema: bool = False,
    dtype: torch.dtype | None = None,
    **kwargs,
) -> DnDPipeline:
    """A transformer and its tokenizer as one pipeline.

    The arguments are those of [`convert_rqvae`] and, `kwargs` among them, of [`convert_transformer`]. A code grid that
    the transformer does not tell is the tokenizer's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as the two functions, or because the two models contradict each other.
    """
    grid_size = agreed_grid(read_transformer(transformer_path, use_ema), grid_size)
    vqvae = convert_rqvae(rqvae_path, rqvae_config, grid_size, rqvae_use_ema, dtype)
    if grid_size is None and not vqvae.config.normalize_codes:
        grid_size = vqvae.grid_size
    transformer = convert_transformer(transformer_path, grid_size=grid_size, use_ema=use_ema, dtype=dtype, **kwargs)
    return DnDPipeline(transformer, vqvae)


def export_original(folder: str | os.PathLike, output_dir: str | os.PathLike) -> None:
    """Writes a pipeline folder, or that of one model, in the official format; see [`new_folder`] for `output_dir`.

    `transformer.pt` has its weights under `model` and a plain dict under `args`; `rqvae.pt`, with `config.yaml` beside
    it, under `state_dict`. A LlamaGen tokenizer and the transformer beside it are written in LlamaGen's format.

    Raises:
        ValueError: the folder holds no such model, or one that the official code cannot compute.
    """
    folder, contents, vae_config = Path(folder), {}, None
    is_pipeline = (folder / DnDPipeline.config_name).is_file()
    for part in (folder / "vqvae", folder / "transformer") if is_pipeline else (folder,):
        if not (part / "config.json").is_file():
            raise ValueError(f"{part} must have a config.json, it does not.")
        config = read_json(part / "config.json")
        weights = {name: weight for file in part.glob("*.safetensors") for name, weight in load_file(file).items()}
        if config.get("_class_name") == "RQVAE":
            vae_config = config
            contents |= original_rqvae(config, weights)
        elif config.get("model_type") == DnDConfig.model_type:
            contents["transformer.pt"] = original_transformer(DnDConfig.from_dict(config), weights, vae_config)
        else:
            raise ValueError(f"{folder} must be the folder of a DnDPipeline, DnDForImageGeneration or RQVAE.")
    with new_folder(output_dir) as output:
        for name, content in contents.items():
            if name.endswith(".pt"):
                torch.save(content, output / name)
            else:
                (output / name).write_text(yaml.safe_dump(content), encoding="utf-8")
