"""Pipelines, a transformer with its tokenizer: from two official files to one folder, and back.

Weights are renamed and rearranged but never computed with, so the way back gives every tensor bit for bit.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ..files import new_folder, read_json
from ..models.autoencoder_rqvae import RQVAE
from ..models.configuration_dnd import DnDConfig
from ..models.configuration_rq_transformer import RQTransformerConfig
from ..pipelines.pipeline_dnd import DnDPipeline
from .checkpoint_file import agreed, as_grid, check_sizes, count_numbers
from .rq_transformer import (
    convert_prompt_tokenizer,
    convert_rq_transformer,
    is_rq_transformer,
    original_rq_transformer,
)
from .tokenizer import convert_rqvae, original_rqvae
from .transformer import agreed_grid, convert_transformer, original_transformer, read_transformer


def convert_pipeline(
    transformer_path: str | os.PathLike,
    rqvae_path: str | os.PathLike,
    rqvae_config: str | os.PathLike | None = None,
    rqvae_use_ema: bool = False,
    transformer_config: str | os.PathLike | None = None,
    grid_size: int | Sequence[int] | None = None,
    use_ema: bool = False,
    dtype: torch.dtype | None = None,
    prompt_vocab: str | os.PathLike | None = None,
    prompt_merges: str | os.PathLike | None = None,
    **kwargs,
) -> DnDPipeline:
    """A transformer and its tokenizer as one pipeline.

    The arguments are those of [`convert_rqvae`] and [`convert_any_transformer`], and for the text tokenizer those of
    [`convert_prompt_tokenizer`]; without them a text-conditional pipeline takes token ids only. A code grid that the
    transformer does not tell is the tokenizer's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as the two functions, or because the two models contradict each other.
    """
    rq_transformer = is_rq_transformer(transformer_path, use_ema)
    if not rq_transformer:
        grid_size = agreed_grid(read_transformer(transformer_path, use_ema), grid_size)
    vqvae = convert_rqvae(rqvae_path, rqvae_config, grid_size, rqvae_use_ema, dtype)
    if rq_transformer or (grid_size is None and not vqvae.config.normalize_codes):
        grid_size = vqvae.grid_size
    transformer = convert_any_transformer(
        transformer_path, vqvae, transformer_config, grid_size, use_ema, dtype, **kwargs
    )
    tokenizer = None
    if prompt_vocab is not None or prompt_merges is not None:
        tokenizer = _prompt_tokenizer(prompt_vocab, prompt_merges, transformer.config)
    return DnDPipeline(transformer, vqvae, tokenizer)


def _prompt_tokenizer(
    vocab: str | os.PathLike | None, merges: str | os.PathLike | None, config: PreTrainedConfig
) -> PreTrainedTokenizerFast:
    if vocab is None or merges is None:
        raise ValueError("`prompt_vocab` and `prompt_merges` must be given both: they are one tokenizer.")
    length = getattr(config, "prompt_length", 0)
    if not length:
        raise ValueError("`prompt_vocab` must be None: the transformer reads no text.")
    tokenizer = convert_prompt_tokenizer(vocab, merges, length)
    agreed("The number of text tokens", {"the transformer": config.prompt_vocab_size, str(vocab): len(tokenizer)})
    return tokenizer


def convert_any_transformer(
    path: str | os.PathLike,
    vqvae: RQVAE | None = None,
    config: str | os.PathLike | None = None,
    grid_size: int | Sequence[int] | None = None,
    use_ema: bool = False,
    dtype: torch.dtype | None = None,
    **kwargs,
) -> PreTrainedModel:
    """A transformer of the architecture that its keys tell.

    Args:
        vqvae, config: of [`convert_rq_transformer`], for an RQ-Transformer.
        kwargs: the other arguments of [`convert_transformer`]; of these an RQ-Transformer has `id2label`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as those functions, or an argument of the other architecture is given.
    """
    if not is_rq_transformer(path, use_ema):
        if config is not None:
            raise ValueError(f"`config` must be None: {path} is no RQ-Transformer, got {config}.")
        return convert_transformer(path, grid_size=grid_size, use_ema=use_ema, dtype=dtype, **kwargs)
    for name, value in kwargs.items():
        if value is not None and name != "id2label":
            raise ValueError(f"`{name}` must be None: {path} is an RQ-Transformer, whose files tell it.")
    model = convert_rq_transformer(path, vqvae, config, kwargs.get("id2label"), use_ema, dtype)
    claims = {"the tokenizer, or `grid_size`": grid_size, str(path): tuple(model.config.grid_size)}
    agreed("The code grid", {source: grid and as_grid(grid) for source, grid in claims.items()})
    return model


def export_original(folder: str | os.PathLike, output_dir: str | os.PathLike) -> None:
    """Writes a pipeline folder, or that of one model, in the official format; see [`new_folder`] for `output_dir`.

    `transformer.pt` has its weights under `model` and a plain dict under `args`; `rqvae.pt`, with `config.yaml` beside
    it, under `state_dict`. A LlamaGen tokenizer and the transformer beside it are written in LlamaGen's format. An
    RQ-Transformer is written as `stage2/model.pt` with its `config.yaml`, and the tokenizer beside it as
    `stage1/model.pt` with its own.

    Raises:
        ValueError: the folder holds no such model, or one that the official code cannot compute.
    """
    folder = Path(folder)
    contents: dict[str, Any] = {}
    vae_config = None
    is_pipeline = (folder / DnDPipeline.config_name).is_file()
    for part in (folder / "vqvae", folder / "transformer") if is_pipeline else (folder,):
        if not (part / "config.json").is_file():
            raise ValueError(f"{part} must have a config.json, it does not.")
        config, weights = read_json(part / "config.json"), _read_weights(part)
        if config.get("_class_name") == "RQVAE":
            vae_config = config
            contents |= original_rqvae(config, weights)
        elif config.get("model_type") == DnDConfig.model_type:
            contents["transformer.pt"] = original_transformer(config, weights, vae_config)
        elif config.get("model_type") == RQTransformerConfig.model_type:
            contents = _original_archive(part, config, weights, contents)
        else:
            raise ValueError(f"{folder} must be the folder of a DnDPipeline, of its transformer or of an RQVAE.")
    with new_folder(output_dir) as output:
        for name, content in contents.items():
            (output / name).parent.mkdir(exist_ok=True)
            if name.endswith(".pt"):
                torch.save(content, output / name)
            else:
                (output / name).write_text(yaml.safe_dump(content), encoding="utf-8")


def _original_archive(
    folder: Path, config: Mapping[str, Any], weights: dict[str, Tensor], tokenizer: Mapping[str, Any]
) -> dict[str, Any]:
    """The files of an archive of kakaobrain, from an RQ-Transformer and the files of its tokenizer, if any."""
    names = {"rqvae.pt": "stage1/model.pt", "config.yaml": "stage1/config.yaml"}
    stage1 = {names[name]: content for name, content in tokenizer.items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    rows = shapes.get("embed_conditions.weight", (0,))[0]
    check_sizes(
        config,
        num_hidden_layers=(count_numbers(shapes, r"layers\.(\d+)\."),),
        num_depth_layers=(count_numbers(shapes, r"depth_layers\.(\d+)\."),),
        code_depth=shapes.get("depth_positions.weight", (0,))[:1],
        **{"prompt_vocab_size" if config.get("prompt_length") else "num_classes": (rows, rows - 1)},
    )
    generation_config = GenerationConfig.from_pretrained(folder)
    stage2 = original_rq_transformer(RQTransformerConfig.from_dict(config), generation_config, weights)
    return stage1 | {f"stage2/{name}": content for name, content in stage2.items()}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"The weights in {folder} must be whole, they are not: {error}") from error
