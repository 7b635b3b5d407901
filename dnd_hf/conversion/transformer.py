"""Transformers of the DnD-Transformer (arXiv 2410.01912) and LlamaGen (arXiv 2406.06525), in and out."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_json
from ..models.configuration_dnd import DnDConfig, default_prediction_layers
from ..models.modeling_dnd import DnDForImageGeneration
from .checkpoint_file import (
    Checkpoint,
    agreed,
    as_grid,
    check_official,
    check_sizes,
    count_numbers,
    inverted,
    load_weights,
    read_checkpoint,
    renamed,
    shown,
)


# Names of weights, the official one and ours. They are parts of the full name with a dot before it, and are replaced
# in the order of the table, in either direction.
TRANSFORMER_NAMES = {
    ".tok_embeddings.": ".embed_tokens.",
    ".cls_embedding.embedding_table.": ".embed_classes.",  # the null class, where there is one, is the last row
    ".attention.wqkv.": ".self_attn.qkv_proj.",  # queries, keys and values stacked, which are three weights here
    ".attention.wo.": ".self_attn.o_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".norm.": ".norms.",
    ".output.": ".heads.",
}
STACKED_NAMES = {r"\.[qkv]_proj\.": ".qkv_proj."}
LLAMAGEN_TRANSFORMER_NAMES = {".norm.weight": ".norm.0.weight", ".output.weight": ".output.0.weight"}  # DnD's names

HEAD_DIM = 64
OTHER_HEAD_COUNTS = {3200: 32, 4096: 32}  # by width: LlamaGen's GPT-3B and GPT-7B
RELEASED_DEPTHS = {48: (1, 2, 4, 8)}  # by layers: where `default_prediction_layers` are those of the released models
IMAGENET_LABELS = Path(__file__).with_name("imagenet_labels.json")

# What gave the authors their best FID, by width, depth and classes: DnD-Transformer's sampling scripts (rich text has
# one class, and no guidance) and LlamaGen's GETTING_STARTED.
PAPER_SAMPLING = {
    (1536, 2, 1000): dict(guidance_scale=2.0),
    (2048, 2, 1000): dict(guidance_scale=1.7),
    (1536, 1, 1): dict(temperature=0.1),
    (1536, 8, 1): dict(temperature=0.1),
    (768, 1, 1000): dict(guidance_scale=2.0),
    (1024, 1, 1000): dict(guidance_scale=2.0),
    (1280, 1, 1000): dict(guidance_scale=1.75),
    (1536, 1, 1000): dict(guidance_scale=1.75),
    (3200, 1, 1000): dict(guidance_scale=1.65),
}


def convert_transformer(
    path: str | os.PathLike,
    prediction_layers: Sequence[int] | None = None,
    num_attention_heads: int | None = None,
    grid_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    id2label: Mapping[int, str] | None = None,
    use_ema: bool = False,
    dtype: torch.dtype | None = None,
) -> DnDForImageGeneration:
    """A transformer of the DnD-Transformer or of LlamaGen (class-conditional, B to 3B).

    Sizes, depth and tied heads are read off the tensors; head layers, classes and grid off the training arguments that
    are stored with them (`args`). In a checkpoint without these the only head stands at the last layer, the heads of
    48 layers where the released models have them, and the last class embedding is the null class, unless there are 1
    or 1000. The weights stay memory-mapped: the file is needed until the model is saved or moved.

    Args:
        path: the `.pt` file; the weights lie under `model`, `module` or `state_dict`, or at the top.
        prediction_layers: overrides the 0-based layers of the heads, one per depth.
        num_attention_heads: overrides the number of heads, by default of 64 dimensions (LlamaGen's 3B: of 100).
        grid_size: overrides the (height, width) of the code grid.
        num_classes: overrides the number of classes, without the null class.
        id2label: names of the classes; `None`: ImageNet's, where there are 1000 classes.
        use_ema: take the averaged weights, which lie under `ema`.
        dtype: of the weights; `None`: as in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such checkpoint, could run code, or contradicts itself or an argument.
    """
    checkpoint = read_transformer(path, use_ema)
    grid_size = agreed_grid(checkpoint, grid_size)
    config = _transformer_config(checkpoint, prediction_layers, num_attention_heads, grid_size, num_classes, id2label)
    return _load_transformer(checkpoint, config, dtype)


def read_transformer(path: str | os.PathLike, use_ema: bool) -> Checkpoint:
    """The checkpoint of a class-conditional transformer, under our names; see [`read_checkpoint`] for the errors."""
    checkpoint = read_checkpoint(path, use_ema)
    if any(name.startswith("body_transformer.") for name in checkpoint.tensors):
        raise ValueError(f"{path} is an RQ-Transformer: use `convert_rq_transformer`, with the tokenizer.")
    if checkpoint.argument("gpt_type", str) == "t2i" or "cls_embedding.uncond_embedding" in checkpoint.tensors:
        raise ValueError(f"{path} must be class-conditional (c2i), it is text-conditional (t2i).")
    checkpoint.rename(LLAMAGEN_TRANSFORMER_NAMES)
    checkpoint.rename(TRANSFORMER_NAMES, stacked=STACKED_NAMES)
    return checkpoint


def agreed_grid(checkpoint: Checkpoint, grid_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """(height, width) of the code grid as given or as the file tells, which must agree; None where neither does."""
    rotary_shape = checkpoint.rotary_shape
    grid: tuple[int, int] | None
    if grid_size is not None:
        grid = as_grid(grid_size)
    else:
        sides = {}
        size, stride = (checkpoint.argument(name, int) for name in ("image_size", "downsample_size"))
        if size and stride:
            sides["`args`: image_size / downsample_size"] = size // stride
        if rotary_shape:
            sides["`freqs_cis`"] = math.isqrt(rotary_shape[0] - 1)
        side = agreed(f"The height and width of the code grid of {checkpoint.path}", sides)
        grid = as_grid(side) if side else None
    if grid and rotary_shape:
        agreed("Cells of the code grid", {f"grid {grid}": math.prod(grid), "`freqs_cis`": rotary_shape[0] - 1})
    return grid


def _transformer_config(
    checkpoint: Checkpoint,
    prediction_layers: Sequence[int] | None,
    num_attention_heads: int | None,
    grid_size: tuple[int, int] | None,
    num_classes: int | None,
    id2label: Mapping[int, str] | None,
) -> DnDConfig:
    path = checkpoint.path
    vocab_size, width = checkpoint.shape("embed_tokens.weight", 2)
    said = {f"`args.{name}`": checkpoint.argument(name, int) for name in ("vocab_size", "num_pred_heads")}
    agreed("The codebook size", {"`tok_embeddings.weight`": vocab_size, "`args.vocab_size`": said["`args.vocab_size`"]})
    layers, depth = checkpoint.count(r"layers\.(\d+)\."), checkpoint.count(r"heads\.(\d+)\.")
    if not depth:
        raise ValueError(f"{path} must have the key `output.0.weight` or `output.weight`, it does not.")
    agreed("The code depth", {"`output.*`": depth, "`args.num_pred_heads`": said["`args.num_pred_heads`"]})
    if grid_size is None:
        raise ValueError(f"`grid_size` must be given, {path} does not tell it.")

    heads, key_value_heads = _attention_heads(checkpoint, width, num_attention_heads)
    num_classes, class_dropout = _classes(checkpoint, num_classes)
    drop_path_rate = checkpoint.argument("drop_path_rate", float, int) or 0.0
    # Training drops out either these or whole layers.
    residual_dropout = 0.0 if drop_path_rate else checkpoint.argument("dropout_p", float, int, default=0.1)
    if id2label is None and num_classes == 1000:
        id2label = dict(enumerate(read_json(IMAGENET_LABELS)))
    return DnDConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=checkpoint.shape("layers.0.mlp.gate_proj.weight", 2)[0],
        grid_size=grid_size,
        code_depth=depth,
        prediction_layers=_prediction_layers(checkpoint, layers, depth, prediction_layers),
        tie_prediction_heads=_heads_are_tied(checkpoint, depth),
        num_classes=num_classes,
        class_dropout_prob=class_dropout,
        embedding_dropout=checkpoint.argument("token_dropout_p", float, int, default=0.1),
        residual_dropout=residual_dropout,
        mlp_dropout=residual_dropout,
        drop_path_rate=drop_path_rate,
        id2label=id2label and dict(id2label),
    )


def _attention_heads(checkpoint: Checkpoint, width: int, num_attention_heads: int | None) -> tuple[int, int]:
    """Number of heads, and of those of keys and values."""
    heads = num_attention_heads or OTHER_HEAD_COUNTS.get(width) or width / HEAD_DIM
    if heads <= 0 or heads != int(heads) or width % heads:
        raise ValueError(
            f"`num_attention_heads` must divide the width of `tok_embeddings.weight`, {width}, got {heads}."
        )
    heads, head_dim = int(heads), width // int(heads)
    if checkpoint.rotary_shape:
        stated = {f"{heads} heads of width {width}": head_dim, "`freqs_cis`": 2 * checkpoint.rotary_shape[1]}
        agreed("The dimensions of a head", stated)
    rows = checkpoint.shape("layers.0.self_attn.qkv_proj.weight", 2)[0]
    if rows <= width or (rows - width) % (2 * head_dim):
        raise ValueError(
            f"`layers.0.attention.wqkv.weight` must have {width} rows for queries and a multiple of {2 * head_dim} for"
            f" keys and values ({heads} heads of {head_dim} dimensions), got {rows}."
        )
    return heads, (rows - width) // (2 * head_dim)


def _prediction_layers(checkpoint: Checkpoint, layers: int, depth: int, given: Sequence[int] | None) -> list[int]:
    prediction_layers = checkpoint.argument("pred_head_positions", str, list, tuple) if given is None else given
    if isinstance(prediction_layers, str):
        numbers = prediction_layers.split(",")
        if not all(re.fullmatch(r"\s*\d{1,6}\s*", number) for number in numbers):
            found = shown(prediction_layers)
            raise ValueError(
                f"`args.pred_head_positions` of {checkpoint.path} must be numbers with commas, got {found}."
            )
        prediction_layers = [int(number) for number in numbers]
    if prediction_layers is None:
        if depth > 1 and depth not in RELEASED_DEPTHS.get(layers, ()):
            raise ValueError(
                f"`prediction_layers` must be given, {checkpoint.path} does not tell them ({layers} layers)."
            )
        prediction_layers = default_prediction_layers(layers, depth)
    if len(prediction_layers) != depth or not all(isinstance(layer, int) for layer in prediction_layers):
        raise ValueError(
            f"`prediction_layers` must be one for each of {depth} `output.*`, got {shown(prediction_layers)}."
        )
    return list(prediction_layers)


def _classes(checkpoint: Checkpoint, given: int | None) -> tuple[int, float]:
    """Number of classes, and the class dropout, above 0 where there is a null class."""
    class_rows = checkpoint.shape("embed_classes.weight", 2)[0]
    dropout = checkpoint.argument("class_dropout_prob", float, int)
    num_classes = given or checkpoint.argument("num_classes", int)
    if num_classes is None:
        num_classes = class_rows - (class_rows not in (1, 1000) if dropout is None else dropout > 0)
    if dropout is None:
        dropout = 0.1 if class_rows > num_classes else 0.0
    if class_rows != num_classes + (dropout > 0):
        raise ValueError(
            f"`cls_embedding.embedding_table.weight` must have a row for each of {num_classes} classes, and one more as"
            f" the class dropout {dropout} is above 0, got {class_rows} rows."
        )
    return num_classes, dropout


def _heads_are_tied(checkpoint: Checkpoint, depth: int) -> bool:
    said = checkpoint.argument("share_prediction_heads", bool, int)
    if depth == 1 or said == 0:
        return False
    names = [f"heads.{k}.weight" for k in range(depth)]
    heads = [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
    equal = len(heads) == depth and all(torch.equal(head, heads[0]) for head in heads)
    if said and not equal:
        raise ValueError("`output.*` must be equal as `args.share_prediction_heads` is set, they are not.")
    return equal


def _load_transformer(checkpoint: Checkpoint, config: DnDConfig, dtype: torch.dtype | None) -> DnDForImageGeneration:
    weights = {}
    for name, weight in checkpoint.tensors.items():
        if ".qkv_proj." in name and weight.shape == _stacked_shape(config):
            parts = weight.split([count * config.head_dim for count in _stacked_heads(config)])
            for part, rows in zip("qkv", parts):
                rows = _swap_pairs(rows, config.head_dim // 2, 2) if part != "v" else rows
                weights[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif not config.tie_prediction_heads or not re.match(r"heads\.(?!0\.)", name):
            weights[name] = weight
    with torch.device("meta"):
        model = DnDForImageGeneration(config)
    load_weights(model, weights, checkpoint, dtype)
    settings = PAPER_SAMPLING.get((config.hidden_size, config.code_depth, config.num_classes), {})
    model.generation_config.update(**settings)
    return model


def _stacked_heads(config: DnDConfig) -> tuple[int, int, int]:
    return config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads


def _stacked_shape(config: DnDConfig) -> tuple[int, int]:
    return sum(_stacked_heads(config)) * config.head_dim, config.hidden_size


def _swap_pairs(weight: Tensor, first: int, second: int) -> Tensor:
    """Each head's rows `(first, second)` as `(second, first)`: the two of a rotary pair are neighbours in the official
    code, and half a head apart in transformers."""
    return weight.view(-1, first, second, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def original_transformer(
    config: dict[str, Any], weights: dict[str, Tensor], vae_config: dict[str, Any] | None
) -> dict[str, Any]:
    """The content of the official file of a transformer.

    Args:
        config: what config.json says.
        weights: of the model.
        vae_config: of the tokenizer beside it, where there is one; a LlamaGen tokenizer's asks for LlamaGen's names.

    Raises:
        ValueError: the configuration is not that of the weights, or the official code cannot compute it.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    num_class_rows = shapes.get("embed_classes.weight", (0,))[0]
    check_sizes(
        config,
        num_hidden_layers=(count_numbers(shapes, r"layers\.(\d+)\."),),
        code_depth=(count_numbers(shapes, r"norms\.(\d+)\."),),
        vocab_size=shapes.get("embed_tokens.weight", (0,))[:1],
        num_classes=(num_class_rows, num_class_rows - 1),
    )
    config = DnDConfig.from_dict(config)
    height, width = config.grid_size
    check_official(
        {
            "`depth_mode` (of more than one depth)": (config.depth_mode if config.code_depth > 1 else "dnd", "dnd"),
            "`grid_size`": ((height, width), (height, height)),
            "`rms_norm_eps`": (config.rms_norm_eps, 1e-5),
            "`rope_theta`": (config.rope_theta, 10000.0),
        }
    )
    state = {}
    for name, weight in weights.items():
        if ".q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            parts[:2] = [_swap_pairs(part, 2, config.head_dim // 2) for part in parts[:2]]
            name, weight = name.replace("q_proj", "qkv_proj"), torch.cat(parts)
        if not re.search(r"\.[kv]_proj\.", name):
            state[renamed(name, inverted(TRANSFORMER_NAMES))] = weight
    if config.tie_prediction_heads:
        state |= {f"output.{k}.weight": state["output.0.weight"] for k in range(config.code_depth)}
    stride = 16
    if vae_config is not None:
        stride = vae_config["code_patch_size"][0] * 2 ** (len(vae_config["block_out_channels"]) - 1)
        if vae_config["normalize_codes"]:
            state = {renamed(name, inverted(LLAMAGEN_TRANSFORMER_NAMES)): weight for name, weight in state.items()}
    return {"model": state, "args": _original_args(config, stride)}


def _original_args(config: DnDConfig, stride: int) -> dict[str, Any]:
    """The training arguments that the official code reads a model's shape from."""
    return dict(
        gpt_type="c2i",
        vocab_size=config.vocab_size,
        cls_token_num=1,
        image_size=config.grid_size[0] * stride,
        downsample_size=stride,
        num_classes=config.num_classes,
        num_pred_heads=config.code_depth,
        class_dropout_prob=config.class_dropout_prob,
        pred_head_positions=",".join(map(str, config.prediction_layers)),
        share_prediction_heads=config.tie_prediction_heads,
        token_dropout_p=config.embedding_dropout,
        dropout_p=config.residual_dropout,
        drop_path_rate=config.drop_path_rate,
    )
