"""Official checkpoints in, this package's models out, and back again.

The family: the DnD-Transformer and its RQ-VAEs (arXiv 2410.01912), kakaobrain's RQ-VAEs (arXiv 2203.01941), and
LlamaGen's class-conditional transformers and VQ tokenizers (arXiv 2406.06525). Weights are renamed and rearranged but
never computed with, so the way back gives every tensor bit for bit.
"""

import argparse
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files import new_folder
from ..models.autoencoder_rqvae import RQVAE
from ..models.configuration_dnd import DnDConfig, default_prediction_layers
from ..models.modeling_dnd import DnDForImageGeneration
from ..pipelines.pipeline_dnd import DnDPipeline


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
LLAMAGEN_TRANSFORMER_NAMES = {".norm.weight": ".norm.0.weight", ".output.weight": ".output.0.weight"}  # DnD's names
BLOCK_NAMES = {
    ".attn.": ".attentions.",
    ".norm.": ".group_norm.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".proj_out.": ".to_out.0.",
    ".nin_shortcut.": ".conv_shortcut.",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    ".norm_out.": ".conv_norm_out.",
}
RQVAE_NAMES = {
    ".mid.block_1.": ".mid_block.resnets.0.",
    ".mid.attn_1.": ".mid_block.attentions.0.",
    ".mid.block_2.": ".mid_block.resnets.1.",
    ".down.": ".down_blocks.",
    ".up.": ".up_blocks.",  # counted from the other end
    ".block.": ".resnets.",
    **BLOCK_NAMES,
}
LLAMAGEN_TOKENIZER_NAMES = {
    ".encoder.conv_blocks.": ".encoder.down_blocks.",
    ".decoder.conv_blocks.": ".decoder.up_blocks.",
    ".mid.0.": ".mid_block.resnets.0.",
    ".mid.1.": ".mid_block.attentions.0.",
    ".mid.2.": ".mid_block.resnets.1.",
    ".res.": ".resnets.",
    ".quantize.embedding.": ".quantizer.codebooks.0.",
    **BLOCK_NAMES,
}
CODEBOOK_NAMES = {  # `quantizer.codebooks.k.…`, one a depth, is stacked here; the last row of `weight` is padding
    "weight": "quantizer.codebooks",
    "cluster_size_ema": "quantizer.cluster_sizes",
    "embed_ema": "quantizer.embedding_sums",
}
CONV_ATTENTION = re.compile(r"\.(to_[qkv]|to_out\.0)\.weight$")  # officially a convolution, (C, C, 1, 1)

# Buffers that some checkpoints carry along; nothing in them was learned.
NOT_WEIGHTS = re.compile(r"(^|\.)(freqs_cis|causal_mask|kv_cache\.[kv]_cache|codebook_used)$")
CODEBOOK_USED_LENGTH = 65536  # LlamaGen's record of recent codes, which its loader insists on
WRAPPERS = ("model", "module", "state_dict")  # as DDP, DeepSpeed and the RQ-VAEs' trainer save
EMA_WRAPPERS = ("ema", "state_dict_ema")
WRAPPER_PREFIX = re.compile(r"^((module|_orig_mod)\.)+")  # of DDP and torch.compile

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
        prediction_layers: overrides the 0-based layers of the heads, one a depth.
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
    checkpoint = _read_transformer(path, use_ema)
    grid_size = _agreed_grid(checkpoint, grid_size)
    config = _transformer_config(checkpoint, prediction_layers, num_attention_heads, grid_size, num_classes, id2label)
    return _load_transformer(checkpoint, config, dtype)


def convert_rqvae(
    path: str | os.PathLike,
    config: str | os.PathLike | None = None,
    grid_size: int | Sequence[int] | None = None,
    use_ema: bool = False,
    dtype: torch.dtype | None = None,
) -> RQVAE:
    """A tokenizer: an RQ-VAE of the DnD-Transformer or kakaobrain, or a VQ tokenizer of LlamaGen (stride 8 or 16).

    Args:
        path: the `.pt` file; the weights lie under `state_dict` or `model`, or at the top.
        config: an RQ-VAE's configuration file; `None`: `config.yaml` beside `path`. LlamaGen's tokenizers have none.
        grid_size: (height, width) of the code grid. An RQ-VAE's is known and must be the same; of LlamaGen's
            tokenizers only the size of the training pictures depends on it, 256 pixels if `None`.
        use_ema: take the averaged weights, which lie under `state_dict_ema` or `ema`.
        dtype: of the weights; `None`: as in the file. The codebooks are float32 always.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such checkpoint, could run code, or contradicts its configuration or an argument.
    """
    checkpoint = _read_checkpoint(path, use_ema)
    if checkpoint.count(r"encoder\.down\.(\d+)\."):
        config_file = Path(path).with_name("config.yaml") if config is None else Path(config)
        return _convert_rqvae(checkpoint, config_file, grid_size, dtype)
    if checkpoint.count(r"encoder\.conv_blocks\.(\d+)\."):
        if config is not None:
            raise ValueError(f"`config` must be None, {path} is a tokenizer of LlamaGen: got {config}.")
        return _convert_llamagen_tokenizer(checkpoint, grid_size, dtype)
    raise ValueError(
        f"{path} must be an RQ-VAE (keys `encoder.down.0.…`) or LlamaGen's tokenizer (`encoder.conv_blocks.0.…`), got"
        f" keys {_some(checkpoint.tensors)}."
    )


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
    grid_size = _agreed_grid(_read_transformer(transformer_path, use_ema), grid_size)
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
        config = _read_json(part / "config.json")
        weights = {name: weight for file in part.glob("*.safetensors") for name, weight in load_file(file).items()}
        if config.get("_class_name") == "RQVAE":
            vae_config = config
            contents |= _original_rqvae(config, weights)
        elif config.get("model_type") == DnDConfig.model_type:
            contents["transformer.pt"] = _original_transformer(DnDConfig.from_dict(config), weights, vae_config)
        else:
            raise ValueError(f"{folder} must be the folder of a DnDPipeline, DnDForImageGeneration or RQVAE.")
    with new_folder(output_dir) as output:
        for name, content in contents.items():
            if name.endswith(".pt"):
                torch.save(content, output / name)
            else:
                (output / name).write_text(yaml.safe_dump(content), encoding="utf-8")


# Reading


@dataclass
class Checkpoint:
    """What an official file holds.

    Args:
        path: the file.
        tensors: the weights, memory-mapped.
        args: the training arguments stored with them, empty where there are none.
        rotary_shape: `(1 + cells, head_dim / 2, 2)` of the rotary table, where it was saved too.
        names: table from the official names to those of `tensors`.
        levels: number of resolutions, where the decoder's levels are counted from the other end.
    """

    path: Path
    tensors: dict[str, Tensor]
    args: dict[str, Any] = field(default_factory=dict)
    rotary_shape: tuple[int, ...] | None = None
    names: dict[str, str] = field(default_factory=dict)
    levels: int = 0

    def rename(self, names: dict[str, str], levels: int = 0) -> None:
        """Renames all tensors to our names."""
        self.names, self.levels = names, levels
        self.tensors = {_mirror(_rename(name, names), levels): tensor for name, tensor in self.tensors.items()}

    def official_name(self, name: str) -> str:
        """The name that a tensor has in the file."""
        name = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name)
        for suffix, stacked in CODEBOOK_NAMES.items():
            name = re.sub(rf"^{re.escape(stacked)}$", f"quantizer.codebooks.0.{suffix}", name)
        return _rename(_mirror(name, self.levels), _inverse(self.names))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which must be there."""
        if name not in self.tensors:
            found = _some([self.official_name(other) for other in self.tensors])
            raise ValueError(f"{self.path} must have the key `{self.official_name(name)}`, got {found}.")
        return tuple(self.tensors[name].shape)

    def count(self, pattern: str) -> int:
        """How many numbers from 0 up to the largest the group of `pattern` matches in the names."""
        matches = (re.match(pattern, name) for name in self.tensors)
        return max((int(match[1]) + 1 for match in matches if match), default=0)


def _read_checkpoint(path: str | os.PathLike, use_ema: bool) -> Checkpoint:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The checkpoint must be a file, there is none at {path}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            mappable = zipfile.is_zipfile(path)  # files from before torch 1.6 are not
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # what is no pickle may fail in any way
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for `{code[1]}`, which could run code" if code else "it is damaged, or something else"
        raise ValueError(f"{path} must be a PyTorch checkpoint of tensors and plain values: {reason}.") from error

    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}.")
    wrappers = EMA_WRAPPERS if use_ema else WRAPPERS
    wrapper = next((key for key in wrappers if isinstance(content.get(key), dict)), None)
    if use_ema and wrapper is None:
        raise ValueError(f"{path} must have averaged weights under {' or '.join(wrappers)}, got keys {_some(content)}.")
    tensors = content[wrapper] if wrapper else content
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(
            f"{path} must have tensors under {', '.join(wrappers)} or at the top, got keys {_some(tensors)}."
        )
    tensors = {WRAPPER_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return Checkpoint(
        path,
        {name: tensor for name, tensor in tensors.items() if not NOT_WEIGHTS.search(name)},
        args if isinstance(args, dict) else {},
        tuple(tensors["freqs_cis"].shape) if "freqs_cis" in tensors else None,
    )


def _read_transformer(path: str | os.PathLike, use_ema: bool) -> Checkpoint:
    checkpoint = _read_checkpoint(path, use_ema)
    if checkpoint.args.get("gpt_type") == "t2i" or "cls_embedding.uncond_embedding" in checkpoint.tensors:
        raise ValueError(f"{path} must be class-conditional (c2i), it is text-conditional (t2i).")
    checkpoint.rename(LLAMAGEN_TRANSFORMER_NAMES)
    checkpoint.rename(TRANSFORMER_NAMES)
    return checkpoint


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path.parent} must have a {path.name}, it does not.")
    return json.loads(path.read_text(encoding="utf-8"))


def _load(model: nn.Module, weights: dict[str, Tensor], checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """Puts the weights into a model without any; floating ones get `dtype`, apart from the quantizer's."""
    expected = model.state_dict()
    problems = {
        "missing keys": expected.keys() - weights.keys(),
        "surplus keys": weights.keys() - expected.keys(),
        "other shapes": {k for k in expected.keys() & weights.keys() if expected[k].shape != weights[k].shape},
    }
    problems = {
        what: sorted({checkpoint.official_name(key) for key in keys}) for what, keys in problems.items() if keys
    }
    if problems:
        found = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items())
        raise ValueError(f"{checkpoint.path} must have the weights that its sizes ask for and no others, got {found}.")
    for name, weight in weights.items():
        if name.startswith("quantizer."):
            weights[name] = weight.float() if weight.is_floating_point() else weight
        elif dtype is not None:
            weights[name] = weight.to(dtype)
    model.load_state_dict(weights, assign=True)
    model.eval()


def _rename(name: str, names: dict[str, str]) -> str:
    name = f".{name}"
    for old, new in names.items():
        name = name.replace(old, new)
    return name[1:]


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def _mirror(name: str, levels: int) -> str:
    if not levels:
        return name
    return re.sub(r"(?<=decoder\.up_blocks\.)\d+", lambda level: str(levels - 1 - int(level[0])), name)


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    names = list(names)
    return ", ".join(f"`{name}`" for name in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _agreed(what: str, claims: dict[str, Any]) -> Any:
    """The one value that all claims, `{who says it: value}`, agree on; `None` claims nothing."""
    claims = {source: value for source, value in claims.items() if value is not None}
    values = list(claims.values())
    if any(value != values[0] for value in values):
        said = ", ".join(f"{value} ({source})" for source, value in claims.items())
        raise ValueError(f"{what} must be the same everywhere, got {said}.")
    return values[0] if values else None


def _as_grid(grid_size: int | Sequence[int]) -> tuple[int, int]:
    grid = (grid_size,) * 2 if isinstance(grid_size, int) else tuple(grid_size)
    grid = grid * 2 if len(grid) == 1 else grid
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"`grid_size` must be a positive (height, width), got {grid_size}.")
    return grid


# Transformers


def _agreed_grid(checkpoint: Checkpoint, grid_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    args, rotary_shape = checkpoint.args, checkpoint.rotary_shape
    if grid_size is not None:
        grid = _as_grid(grid_size)
    else:
        sides = {}
        if args.get("image_size") and args.get("downsample_size"):
            sides["`args`: image_size / downsample_size"] = args["image_size"] // args["downsample_size"]
        if rotary_shape:
            sides["`freqs_cis`"] = math.isqrt(rotary_shape[0] - 1)
        side = _agreed(f"The height and width of the code grid of {checkpoint.path}", sides)
        grid = (side, side) if side else None
    if grid and rotary_shape:
        _agreed("Cells of the code grid", {f"grid {grid}": math.prod(grid), "`freqs_cis`": rotary_shape[0] - 1})
    return grid


def _transformer_config(
    checkpoint: Checkpoint,
    prediction_layers: Sequence[int] | None,
    num_attention_heads: int | None,
    grid_size: tuple[int, int] | None,
    num_classes: int | None,
    id2label: Mapping[int, str] | None,
) -> DnDConfig:
    path, args = checkpoint.path, checkpoint.args
    vocab_size, width = checkpoint.shape("embed_tokens.weight")
    _agreed("The codebook size", {"`tok_embeddings.weight`": vocab_size, "`args.vocab_size`": args.get("vocab_size")})
    layers, depth = checkpoint.count(r"layers\.(\d+)\."), checkpoint.count(r"heads\.(\d+)\.")
    if not depth:
        raise ValueError(f"{path} must have the key `output.0.weight` or `output.weight`, it does not.")
    _agreed("The code depth", {"`output.*`": depth, "`args.num_pred_heads`": args.get("num_pred_heads")})
    if grid_size is None:
        raise ValueError(f"`grid_size` must be given, {path} does not tell it.")

    heads = num_attention_heads or OTHER_HEAD_COUNTS.get(width) or width / HEAD_DIM
    if heads <= 0 or heads != int(heads) or width % heads:
        raise ValueError(
            f"`num_attention_heads` must divide the width of `tok_embeddings.weight`, {width}, got {heads}."
        )
    heads, head_dim = int(heads), width // int(heads)
    if checkpoint.rotary_shape:
        stated = {f"{heads} heads of width {width}": head_dim, "`freqs_cis`": 2 * checkpoint.rotary_shape[1]}
        _agreed("The dimensions of a head", stated)
    rows = checkpoint.shape("layers.0.self_attn.qkv_proj.weight")[0]
    if rows <= width or (rows - width) % (2 * head_dim):
        raise ValueError(
            f"`layers.0.attention.wqkv.weight` must have {width} rows for queries and a multiple of {2 * head_dim} for"
            f" keys and values ({heads} heads of {head_dim} dimensions), got {rows}."
        )

    if prediction_layers is None:
        prediction_layers = args.get("pred_head_positions")
    if isinstance(prediction_layers, str):
        prediction_layers = [int(layer) for layer in prediction_layers.split(",")]
    if prediction_layers is None:
        if depth > 1 and depth not in RELEASED_DEPTHS.get(layers, ()):
            raise ValueError(f"`prediction_layers` must be given, {path} does not tell them ({layers} layers).")
        prediction_layers = default_prediction_layers(layers, depth)
    if len(prediction_layers) != depth:
        raise ValueError(f"`prediction_layers` must be one for each of {depth} `output.*`, got {prediction_layers}.")

    class_rows, dropout = checkpoint.shape("embed_classes.weight")[0], args.get("class_dropout_prob")
    num_classes = num_classes or args.get("num_classes")
    if num_classes is None:
        num_classes = class_rows - (class_rows not in (1, 1000) if dropout is None else dropout > 0)
    if dropout is None:
        dropout = 0.1 if class_rows > num_classes else 0.0
    if class_rows != num_classes + (dropout > 0):
        raise ValueError(
            f"`cls_embedding.embedding_table.weight` must have a row for each of {num_classes} classes, and one more as"
            f" the class dropout {dropout} is above 0, got {class_rows} rows."
        )
    drop_path_rate = args.get("drop_path_rate") or 0.0
    residual_dropout = 0.0 if drop_path_rate else args.get("dropout_p", 0.1)  # training uses one or the other
    if id2label is None and num_classes == 1000:
        id2label = dict(enumerate(_read_json(IMAGENET_LABELS)))
    return DnDConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=(rows - width) // (2 * head_dim),
        intermediate_size=checkpoint.shape("layers.0.mlp.gate_proj.weight")[0],
        grid_size=grid_size,
        code_depth=depth,
        prediction_layers=list(prediction_layers),
        tie_prediction_heads=_heads_are_tied(checkpoint, depth),
        num_classes=num_classes,
        class_dropout_prob=dropout,
        embedding_dropout=args.get("token_dropout_p", 0.1),
        residual_dropout=residual_dropout,
        mlp_dropout=residual_dropout,
        drop_path_rate=drop_path_rate,
        id2label=id2label and dict(id2label),
    )


def _heads_are_tied(checkpoint: Checkpoint, depth: int) -> bool:
    said = checkpoint.args.get("share_prediction_heads")
    if depth == 1 or said == 0:
        return False
    heads = [checkpoint.tensors.get(f"heads.{k}.weight") for k in range(depth)]
    equal = all(head is not None and torch.equal(head, heads[0]) for head in heads)
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
    _load(model, weights, checkpoint, dtype)
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


def _original_transformer(config: DnDConfig, weights: dict[str, Tensor], vae_config: dict | None) -> dict[str, Any]:
    height, width = config.grid_size
    _check_fixed(
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
            state[_rename(name, _inverse(TRANSFORMER_NAMES))] = weight
    if config.tie_prediction_heads:
        state |= {f"output.{k}.weight": state["output.0.weight"] for k in range(config.code_depth)}
    stride = 16
    if vae_config is not None:
        stride = vae_config["code_patch_size"][0] * 2 ** (len(vae_config["block_out_channels"]) - 1)
        if vae_config["normalize_codes"]:
            state = {_rename(name, _inverse(LLAMAGEN_TRANSFORMER_NAMES)): weight for name, weight in state.items()}
    args = dict(
        gpt_type="c2i",
        vocab_size=config.vocab_size,
        cls_token_num=1,
        image_size=height * stride,
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
    return {"model": state, "args": args}


def _check_fixed(values: dict[str, tuple[Any, Any]]) -> None:
    for name, (value, fixed) in values.items():
        if value != fixed:
            raise ValueError(f"{name} must be {fixed} for the official code, got {value}.")


# Tokenizers


def _convert_rqvae(
    checkpoint: Checkpoint, config_file: Path, grid_size: int | Sequence[int] | None, dtype: torch.dtype | None
) -> RQVAE:
    hparams, ddconfig = _read_rqvae_config(config_file)
    levels = checkpoint.count(r"encoder\.down\.(\d+)\.")
    checkpoint.rename(RQVAE_NAMES, levels)
    shape = _tokenizer_shape(checkpoint)
    depth = checkpoint.count(r"quantizer\.codebooks\.(\d+)\.")
    num_codes = checkpoint.shape("quantizer.codebooks.0.weight")[0] - 1
    latent_shape, code_shape = hparams["latent_shape"], hparams["code_shape"]
    for name, said, found in (
        ("hparams.n_embed", _only(hparams["n_embed"]), num_codes),
        ("hparams.code_shape[2]", code_shape[2], depth),
        ("hparams.embed_dim", hparams["embed_dim"], shape["vq_embed_dim"]),
        ("hparams.latent_shape[2]", latent_shape[2], shape["vq_embed_dim"]),
        ("ddconfig.z_channels", ddconfig["z_channels"], shape["latent_channels"]),
        ("ddconfig.num_res_blocks", ddconfig["num_res_blocks"], shape["layers_per_block"]),
        ("ddconfig.ch", ddconfig["ch"], checkpoint.shape("encoder.conv_in.weight")[0]),
        ("ddconfig.ch_mult", [ddconfig["ch"] * by for by in ddconfig["ch_mult"]], list(shape["block_out_channels"])),
        (
            "ddconfig.attn_resolutions",
            [ddconfig["resolution"] // 2**level in ddconfig["attn_resolutions"] for level in range(levels)],
            [block.startswith("Attn") for block in shape["down_block_types"]],
        ),
    ):
        _agreed(f"`{name}`", {str(config_file): said, f"tensors of {checkpoint.path}": found})
    if ddconfig["ch_mult"][0] != 1:
        raise ValueError(f"`ddconfig.ch_mult` must begin with 1 (diffusers' first level), got {ddconfig['ch_mult']}.")
    if any(latent_shape[axis] % code_shape[axis] for axis in (0, 1)):
        raise ValueError(f"`code_shape` must divide `latent_shape` {latent_shape} in {config_file}, got {code_shape}.")
    if grid_size is not None:
        grids = {"the transformer, or `grid_size`": _as_grid(grid_size), str(config_file): tuple(code_shape[:2])}
        _agreed("The code grid", grids)

    codebooks = {stacked: [] for stacked in CODEBOOK_NAMES.values()}
    for suffix, stacked in CODEBOOK_NAMES.items():
        for k in range(depth):
            checkpoint.shape(f"quantizer.codebooks.{k}.{suffix}")
            codebook = checkpoint.tensors.pop(f"quantizer.codebooks.{k}.{suffix}")
            codebooks[stacked].append(codebook[:-1] if suffix == "weight" else codebook)
    shared = hparams["shared_codebook"]
    if shared and not all(torch.equal(book, books[0]) for books in codebooks.values() for book in books):
        raise ValueError(
            f"`quantizer.codebooks.*` of {checkpoint.path} must be equal as {config_file} says `shared_codebook: true`."
        )
    checkpoint.tensors |= {name: torch.stack(books[:1] if shared else books) for name, books in codebooks.items()}
    stride = 2 ** (levels - 1)
    return _load_tokenizer(
        checkpoint,
        dtype,
        **shape,
        num_vq_embeddings=num_codes,
        sample_size=(latent_shape[0] * stride, latent_shape[1] * stride),
        code_depth=depth,
        shared_codebook=shared,
        code_patch_size=(latent_shape[0] // code_shape[0], latent_shape[1] // code_shape[1]),
        ema_decay=_only(hparams.get("decay", 0.99)),
        restart_unused_codes=hparams.get("restart_unused_codes", False),
        commitment_weight=hparams.get("latent_loss_weight", 0.25),
    )


def _convert_llamagen_tokenizer(
    checkpoint: Checkpoint, grid_size: int | Sequence[int] | None, dtype: torch.dtype | None
) -> RQVAE:
    checkpoint.rename(LLAMAGEN_TOKENIZER_NAMES)
    shape = _tokenizer_shape(checkpoint)
    num_codes = checkpoint.shape("quantizer.codebooks.0.weight")[0]
    codebooks = checkpoint.tensors.pop("quantizer.codebooks.0.weight")[None]
    checkpoint.tensors |= {  # trained by gradients, not as moving averages
        "quantizer.codebooks": codebooks,
        "quantizer.cluster_sizes": torch.ones(1, num_codes),
        "quantizer.embedding_sums": codebooks.clone(),
    }
    stride = 2 ** (len(shape["block_out_channels"]) - 1)
    height, width = (256 // stride, 256 // stride) if grid_size is None else _as_grid(grid_size)
    size = (height * stride, width * stride)
    return _load_tokenizer(
        checkpoint, dtype, **shape, num_vq_embeddings=num_codes, sample_size=size, code_depth=1, normalize_codes=True
    )


def _tokenizer_shape(checkpoint: Checkpoint) -> dict[str, Any]:
    """The arguments of [`RQVAE`] that the tensors tell."""

    def attention(block: str) -> str:
        return "Attn" * any(name.startswith(f"{block}.attentions.") for name in checkpoint.tensors)

    levels = range(checkpoint.count(r"encoder\.down_blocks\.(\d+)\."))
    resnet = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    return dict(
        in_channels=checkpoint.shape("encoder.conv_in.weight")[1],
        out_channels=checkpoint.shape("decoder.conv_out.weight")[0],
        down_block_types=tuple(attention(f"encoder.down_blocks.{i}") + "DownEncoderBlock2D" for i in levels),
        up_block_types=tuple(attention(f"decoder.up_blocks.{i}") + "UpDecoderBlock2D" for i in levels),
        block_out_channels=tuple(checkpoint.shape(resnet.format(i))[0] for i in levels),
        layers_per_block=checkpoint.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        latent_channels=checkpoint.shape("encoder.conv_out.weight")[0],
        vq_embed_dim=checkpoint.shape("quant_conv.weight")[0],
    )


def _load_tokenizer(checkpoint: Checkpoint, dtype: torch.dtype | None, **config) -> RQVAE:
    with torch.device("meta"):
        vae = RQVAE(**config)
    weights = {
        name: weight.flatten(1) if CONV_ATTENTION.search(name) else weight
        for name, weight in checkpoint.tensors.items()
    }
    weights["quantizer.num_updates"] = torch.zeros((), dtype=torch.int64)
    _load(vae, weights, checkpoint, dtype)
    return vae


def _read_rqvae_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"An RQ-VAE needs its config.yaml, beside the checkpoint or named: none at {path}.")
    try:
        arch = yaml.safe_load(path.read_text(encoding="utf-8"))["arch"]
        hparams, ddconfig = dict(arch["hparams"]), dict(arch["ddconfig"])
        kind = (arch.get("type", "rq-vae"), hparams.get("bottleneck_type", "rq"))
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be YAML with `arch.hparams` and `arch.ddconfig`, it is not.") from error
    if kind != ("rq-vae", "rq"):
        raise ValueError(f"{path} must be of type `rq-vae` with bottleneck `rq`, got {kind}.")
    needed = {
        "hparams": (hparams, ("embed_dim", "n_embed", "latent_shape", "code_shape", "shared_codebook")),
        "ddconfig": (ddconfig, ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels", "resolution")),
    }
    missing = [f"{part}.{name}" for part, (values, names) in needed.items() for name in names if name not in values]
    if missing:
        raise ValueError(f"{path} must have {_some(missing)} under `arch`, it does not.")
    for name in ("latent_shape", "code_shape"):
        if not isinstance(hparams[name], list) or len(hparams[name]) != 3:
            raise ValueError(f"`hparams.{name}` of {path} must be [height, width, depth], got {hparams[name]}.")
    return hparams, ddconfig


def _only(values: Any) -> Any:
    """The value that a list has for every depth."""
    if not isinstance(values, (list, tuple)):
        return values
    if len(set(values)) != 1:
        raise ValueError(f"Codebooks must have the same size and decay at all depths, got {values}.")
    return values[0]


def _original_rqvae(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    channels, depth, shared = config["block_out_channels"], config["code_depth"], config["shared_codebook"]
    levels = len(channels)
    attention = [f"encoder.down_blocks.{i}.attentions.0.to_q.weight" in weights for i in range(levels)]
    decoder_attention = [f"decoder.up_blocks.{i}.attentions.0.to_q.weight" in weights for i in range(levels)]
    llamagen = config["normalize_codes"]
    only_last = [False] * (levels - 1) + [True]
    _check_fixed(
        {
            "`act_fn`": (config["act_fn"], "silu"),
            "`norm_num_groups`": (config["norm_num_groups"], 32),
            "`mid_block_add_attention`": (config["mid_block_add_attention"], True),
            "Attention by level": (attention, only_last if llamagen else decoder_attention[::-1]),
            "`block_out_channels`": (channels, [c // channels[0] * channels[0] for c in channels]),
        }
    )
    names, mirrored = (LLAMAGEN_TOKENIZER_NAMES, 0) if llamagen else (RQVAE_NAMES, levels)
    state = {}
    for name, weight in weights.items():
        weight = weight[:, :, None, None] if CONV_ATTENTION.search(name) else weight
        if not name.startswith("quantizer."):
            state[_rename(_mirror(name, mirrored), _inverse(names))] = weight
    dtype = weights["quant_conv.weight"].dtype
    codebooks = {suffix: _narrowed(weights[stacked], dtype) for suffix, stacked in CODEBOOK_NAMES.items()}
    if llamagen:
        state["quantize.embedding.weight"] = codebooks["weight"][0]
        state["quantize.codebook_used"] = torch.zeros(CODEBOOK_USED_LENGTH)
        return {"rqvae.pt": {"model": state}}
    codebooks["weight"] = F.pad(codebooks["weight"], (0, 0, 0, 1))
    for suffix, books in codebooks.items():
        state |= {f"quantizer.codebooks.{k}.{suffix}": books[0 if shared else k].clone() for k in range(depth)}

    stride, size = 2 ** (levels - 1), config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    cells, patch, embed_dim = (
        (height // stride, width // stride),
        config["code_patch_size"],
        len(state["quant_conv.bias"]),
    )
    hparams = dict(
        bottleneck_type="rq",
        embed_dim=embed_dim,
        n_embed=config["num_vq_embeddings"],
        latent_shape=[*cells, embed_dim],
        code_shape=[cells[0] // patch[0], cells[1] // patch[1], depth],
        shared_codebook=shared,
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
    arch = dict(type="rq-vae", code_hier=1, checkpointing=False, hparams=hparams, ddconfig=ddconfig)
    return {"rqvae.pt": {"state_dict": state}, "config.yaml": {"arch": arch}}


def _narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, where that loses nothing: the codebooks, float32 here, are officially stored as all other weights."""
    return weight.to(dtype) if torch.equal(weight.to(dtype).float(), weight) else weight
