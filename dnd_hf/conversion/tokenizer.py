"""Tokenizers in and out: RQ-VAEs of the DnD-Transformer and kakaobrain (arXiv 2203.01941), LlamaGen's VQ tokenizers."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.autoencoder_rqvae import RQVAE
from .checkpoint_file import (
    Checkpoint,
    agreed,
    as_grid,
    check_official,
    check_sizes,
    inverted,
    listed,
    load_weights,
    mirrored,
    read_checkpoint,
    renamed,
    shown,
)
from .rqvae_config import original_rqvae_config, read_rqvae_config


# Names of weights, the official one and ours, as in transformer.py.
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

CODEBOOK_NAMES = {  # `quantizer.codebooks.k.…`, one per depth, is stacked here; the last row of `weight` is padding
    "weight": "quantizer.codebooks",
    "cluster_size_ema": "quantizer.cluster_sizes",
    "embed_ema": "quantizer.embedding_sums",
}
STACKED_NAMES = {rf"^{re.escape(ours)}$": f"quantizer.codebooks.0.{name}" for name, ours in CODEBOOK_NAMES.items()}
CONV_ATTENTION = re.compile(r"\.(to_[qkv]|to_out\.0)\.weight$")  # officially a convolution, (C, C, 1, 1)
MAX_SHARED_DEPTH = 1024  # of a shared codebook, whose weights do not tell the depth
CODEBOOK_USED_LENGTH = 65536  # LlamaGen's record of recent codes, which its loader insists on


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
            tokenizers only the size of the training images depends on it, 256 pixels if `None`.
        use_ema: take the averaged weights, which lie under `state_dict_ema` or `ema`.
        dtype: of the weights; `None`: as in the file. The codebooks are float32 always.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such checkpoint, could run code, or contradicts its configuration or an argument.
    """
    checkpoint = read_checkpoint(path, use_ema)
    if checkpoint.count(r"encoder\.down\.(\d+)\."):
        config_file = Path(path).with_name("config.yaml") if config is None else Path(config)
        return _convert_rqvae(checkpoint, config_file, grid_size, dtype)
    if checkpoint.count(r"encoder\.conv_blocks\.(\d+)\."):
        if config is not None:
            raise ValueError(f"`config` must be None, {path} is a tokenizer of LlamaGen: got {config}.")
        return _convert_llamagen_tokenizer(checkpoint, grid_size, dtype)
    raise ValueError(
        f"{path} must be an RQ-VAE (keys `encoder.down.0.…`) or LlamaGen's tokenizer (`encoder.conv_blocks.0.…`), got"
        f" keys {listed(checkpoint.tensors)}."
    )


def _convert_rqvae(
    checkpoint: Checkpoint, config_file: Path, grid_size: int | Sequence[int] | None, dtype: torch.dtype | None
) -> RQVAE:
    hparams, ddconfig = read_rqvae_config(config_file)
    levels = checkpoint.count(r"encoder\.down\.(\d+)\.")
    checkpoint.rename(RQVAE_NAMES, levels, STACKED_NAMES)
    shape = _tokenizer_shape(checkpoint)
    depth = checkpoint.count(r"quantizer\.codebooks\.(\d+)\.")
    num_codes = checkpoint.shape("quantizer.codebooks.0.weight", 2)[0] - 1
    latent_shape, code_shape = hparams["latent_shape"], hparams["code_shape"]
    _check_agreement(checkpoint, config_file, hparams, ddconfig, shape, depth, num_codes)
    if grid_size is not None:
        grids = {"the transformer, or `grid_size`": as_grid(grid_size), str(config_file): tuple(code_shape[:2])}
        agreed("The code grid", grids)

    codebooks: dict[str, list[Tensor]] = {stacked: [] for stacked in CODEBOOK_NAMES.values()}
    for suffix, stacked in CODEBOOK_NAMES.items():
        for k in range(depth):
            checkpoint.shape(f"quantizer.codebooks.{k}.{suffix}", 1 if suffix == "cluster_size_ema" else 2)
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
        ema_decay=_only(hparams["decay"]),
        restart_unused_codes=hparams["restart_unused_codes"],
        commitment_weight=hparams["latent_loss_weight"],
    )


def _check_agreement(
    checkpoint: Checkpoint,
    config_file: Path,
    hparams: dict[str, Any],
    ddconfig: dict[str, Any],
    shape: dict[str, Any],
    depth: int,
    num_codes: int,
) -> None:
    """Raises ValueError unless the configuration file says what the tensors tell."""
    latent_shape, code_shape, levels = hparams["latent_shape"], hparams["code_shape"], len(shape["block_out_channels"])
    as_grid(latent_shape[:2])
    for name, said, found in (
        ("hparams.n_embed", _only(hparams["n_embed"]), num_codes),
        ("hparams.code_shape[2]", code_shape[2], depth),
        ("hparams.embed_dim", hparams["embed_dim"], shape["vq_embed_dim"]),
        ("hparams.latent_shape[2]", latent_shape[2], shape["vq_embed_dim"]),
        ("ddconfig.z_channels", ddconfig["z_channels"], shape["latent_channels"]),
        ("ddconfig.num_res_blocks", ddconfig["num_res_blocks"], shape["layers_per_block"]),
        ("ddconfig.ch", ddconfig["ch"], checkpoint.shape("encoder.conv_in.weight", 4)[0]),
        ("ddconfig.ch_mult", [ddconfig["ch"] * by for by in ddconfig["ch_mult"]], list(shape["block_out_channels"])),
        (
            "ddconfig.attn_resolutions",
            [ddconfig["resolution"] // 2**level in ddconfig["attn_resolutions"] for level in range(levels)],
            [block.startswith("Attn") for block in shape["down_block_types"]],
        ),
    ):
        agreed(f"`{name}`", {str(config_file): said, f"tensors of {checkpoint.path}": found})
    if ddconfig["ch_mult"][0] != 1:
        raise ValueError(f"`ddconfig.ch_mult` must begin with 1 (diffusers' first level), got {ddconfig['ch_mult']}.")
    if any(latent_shape[axis] % code_shape[axis] for axis in (0, 1)):
        raise ValueError(f"`code_shape` must divide `latent_shape` {latent_shape} in {config_file}, got {code_shape}.")


def _convert_llamagen_tokenizer(
    checkpoint: Checkpoint, grid_size: int | Sequence[int] | None, dtype: torch.dtype | None
) -> RQVAE:
    checkpoint.rename(LLAMAGEN_TOKENIZER_NAMES, stacked=STACKED_NAMES)
    shape = _tokenizer_shape(checkpoint)
    num_codes = checkpoint.shape("quantizer.codebooks.0.weight", 2)[0]
    codebooks = checkpoint.tensors.pop("quantizer.codebooks.0.weight")[None]
    checkpoint.tensors |= {  # trained by gradients, not as moving averages
        "quantizer.codebooks": codebooks,
        "quantizer.cluster_sizes": torch.ones(1, num_codes),
        "quantizer.embedding_sums": codebooks.clone(),
    }
    stride = 2 ** (len(shape["block_out_channels"]) - 1)
    height, width = (256 // stride, 256 // stride) if grid_size is None else as_grid(grid_size)
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
        in_channels=checkpoint.shape("encoder.conv_in.weight", 4)[1],
        out_channels=checkpoint.shape("decoder.conv_out.weight", 4)[0],
        down_block_types=tuple(attention(f"encoder.down_blocks.{i}") + "DownEncoderBlock2D" for i in levels),
        up_block_types=tuple(attention(f"decoder.up_blocks.{i}") + "UpDecoderBlock2D" for i in levels),
        block_out_channels=tuple(checkpoint.shape(resnet.format(i), 4)[0] for i in levels),
        layers_per_block=checkpoint.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        latent_channels=checkpoint.shape("encoder.conv_out.weight", 4)[0],
        vq_embed_dim=checkpoint.shape("quant_conv.weight", 4)[0],
    )


def _load_tokenizer(checkpoint: Checkpoint, dtype: torch.dtype | None, **config) -> RQVAE:
    with torch.device("meta"):
        vae = RQVAE(**config)
    weights = {
        name: weight.flatten(1) if CONV_ATTENTION.search(name) else weight
        for name, weight in checkpoint.tensors.items()
    }
    weights["quantizer.num_updates"] = torch.zeros((), dtype=torch.int64)
    load_weights(vae, weights, checkpoint, dtype)
    return vae


def _only(values: Any) -> Any:
    """The value that a list has for every depth."""
    if not isinstance(values, list):
        return values
    if len(set(values)) != 1:
        found = shown(values)
        raise ValueError(f"Codebooks must have the same size and decay at all depths, got {found}.")
    return values[0]


def original_rqvae(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """`{file name: content}` of an [`RQVAE`] in the official format, of its `config` and `weights`.

    Raises:
        ValueError: the configuration is not that of the weights, or the official code cannot compute it.
    """
    missing = [name for name in (*CODEBOOK_NAMES.values(), "quant_conv.weight") if name not in weights]
    if missing:
        raise ValueError(f"The weights of a tokenizer must have {listed(missing)}, they do not.")
    depths = weights["quantizer.codebooks"].shape[:1]
    check_sizes(config, code_depth=range(1, MAX_SHARED_DEPTH + 1) if config["shared_codebook"] else depths)
    channels, depth, shared = config["block_out_channels"], config["code_depth"], config["shared_codebook"]
    levels = len(channels)
    attention = [f"encoder.down_blocks.{i}.attentions.0.to_q.weight" in weights for i in range(levels)]
    decoder_attention = [f"decoder.up_blocks.{i}.attentions.0.to_q.weight" in weights for i in range(levels)]
    llamagen = config["normalize_codes"]
    only_last = [False] * (levels - 1) + [True]
    check_official(
        {
            "`act_fn`": (config["act_fn"], "silu"),
            "`norm_num_groups`": (config["norm_num_groups"], 32),
            "`mid_block_add_attention`": (config["mid_block_add_attention"], True),
            "`local_encoder`": (config.get("local_encoder", False), False),
            "Attention by level": (attention, only_last if llamagen else decoder_attention[::-1]),
            "`block_out_channels`": (channels, [c // channels[0] * channels[0] for c in channels]),
        }
    )
    names, mirrored_levels = (LLAMAGEN_TOKENIZER_NAMES, 0) if llamagen else (RQVAE_NAMES, levels)
    state = {}
    for name, weight in weights.items():
        weight = weight[:, :, None, None] if CONV_ATTENTION.search(name) else weight
        if not name.startswith("quantizer."):
            state[renamed(mirrored(name, mirrored_levels), inverted(names))] = weight
    dtype = weights["quant_conv.weight"].dtype
    codebooks = {suffix: _narrowed(weights[stacked], dtype) for suffix, stacked in CODEBOOK_NAMES.items()}
    if llamagen:
        state["quantize.embedding.weight"] = codebooks["weight"][0]
        state["quantize.codebook_used"] = torch.zeros(CODEBOOK_USED_LENGTH)
        return {"rqvae.pt": {"model": state}}
    codebooks["weight"] = F.pad(codebooks["weight"], (0, 0, 0, 1))
    for suffix, books in codebooks.items():
        state |= {f"quantizer.codebooks.{k}.{suffix}": books[0 if shared else k].clone() for k in range(depth)}

    return {"rqvae.pt": {"state_dict": state}, "config.yaml": {"arch": original_rqvae_config(config, attention)}}


def _narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, where that loses nothing: the codebooks, float32 here, are officially stored as all other weights."""
    return weight.to(dtype) if torch.equal(weight.to(dtype).float(), weight) else weight
