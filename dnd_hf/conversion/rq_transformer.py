"""RQ-Transformers of kakaobrain (arXiv 2203.01941) and the text tokenizers of theirs, in and out.

An archive of theirs holds `stage2/model.pt` and, beside it, the `config.yaml` that says what the tensors do not.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import CharBPETokenizer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ..files import read_json
from ..models.autoencoder_rqvae import RQVAE
from ..models.configuration_rq_transformer import RQTransformerConfig
from ..models.modeling_rq_transformer import RQTransformerForImageGeneration
from .checkpoint_file import (
    Checkpoint,
    agreed,
    as_grid,
    check_official,
    inverted,
    listed,
    load_weights,
    read_checkpoint,
    read_yaml,
    renamed,
    shown,
)


# Names of weights, the official one and ours; see the table of the same kind in `conversion/transformer.py`.
RQ_TRANSFORMER_NAMES = {
    ".cond_emb.": ".embed_conditions.",
    ".pos_emb_cond": ".condition_positions.weight",  # the three officially have one axis more
    ".pos_emb_hw": ".cell_positions.weight",
    ".pos_emb_d": ".depth_positions.weight",
    ".input_mlp.": ".body_projection.",
    ".head_mlp.": ".depth_projection.",
    ".tok_emb.": ".embed_codes.",  # of all depths, one after the other, where they have separate tables
    ".body_transformer.blocks.": ".layers.",
    ".head_transformer.blocks.": ".depth_layers.",
    ".ln1.": ".input_layernorm.",
    ".ln2.": ".post_attention_layernorm.",
    ".attn.query.": ".self_attn.q_proj.",
    ".attn.key.": ".self_attn.k_proj.",
    ".attn.value.": ".self_attn.v_proj.",
    ".attn.proj.": ".self_attn.o_proj.",
    ".mlp.0.": ".mlp.up_proj.",
    ".mlp.2.": ".mlp.down_proj.",
    ".cond_classifier.layer_norm.": ".prompt_norm.",
    ".cond_classifier.linear.": ".prompt_head.",
    ".classifier.layer_norm.": ".norm.",
    ".classifier.linear.": ".heads.0.",  # without shared classifiers those of all depths are one tensor
}
BLOCK_KEYS = r"body_transformer\.blocks\.(\d+)\."  # by which the checkpoint is known
STACKED_NAMES = {r"^heads\.\d+\.": "heads.0."}
POSITIONS = ("condition_positions.weight", "cell_positions.weight", "depth_positions.weight")
ACTIVATIONS = {"v1": "gelu", "v2": "quick_gelu"}
SAMPLING_NAMES = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p"}

# What holds where a config.yaml leaves it out, and what no published model has otherwise (nor this package).
ARCH_DEFAULTS = dict(
    input_emb_vqvae=False,
    head_emb_vqvae=False,
    cumsum_depth_ctx=False,
    shared_tok_emb=False,
    shared_cls_emb=False,
    vocab_size_cond=0,
    block_size_cond=0,
    embd_pdrop=0.0,
)
ARCH_FIXED = dict(type="rq-transformer", use_padding_emb=False, scaled_head_emb_vqvae=False)
BLOCK_DEFAULTS = dict(gelu="v1", attn_pdrop=0.0, resid_pdrop=0.1)
BLOCK_FIXED = dict(attn_bias=True, mlp_bias=True)
IMAGENET_LABELS = Path(__file__).with_name("imagenet_labels.json")


def convert_rq_transformer(
    path: str | os.PathLike,
    vqvae: RQVAE | None = None,
    config: str | os.PathLike | None = None,
    id2label: Mapping[int, str] | None = None,
    use_ema: bool = False,
    dtype: torch.dtype | None = None,
) -> RQTransformerForImageGeneration:
    """An RQ-Transformer of kakaobrain: unconditional, of classes, or of text.

    Its `sampling` becomes the model's generation configuration. The weights stay memory-mapped: the file is needed
    until the model is saved or moved.

    Args:
        path: the `model.pt`; the weights lie under `state_dict`, or at the top.
        vqvae: the tokenizer, needed where the model reads its code vectors, as all published ones do.
        config: the configuration file; `None`: `config.yaml` beside `path`.
        id2label: names of the classes; `None`: ImageNet's, where there are 1000 classes.
        use_ema: take the averaged weights, which lie under `state_dict_ema`.
        dtype: of the weights; `None`: as in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such checkpoint, could run code, or contradicts its configuration or the tokenizer.
    """
    checkpoint = read_checkpoint(path, use_ema)
    if not checkpoint.count(BLOCK_KEYS):
        found = listed(checkpoint.tensors)
        raise ValueError(f"{path} must be an RQ-Transformer (keys `body_transformer.blocks.0.…`), got keys {found}.")
    config_file = Path(path).with_name("config.yaml") if config is None else Path(config)
    settings = _read_settings(config_file)
    _check_counts(checkpoint, settings["arch"], config_file)
    model_config = _model_config(settings, config_file, vqvae, id2label)
    checkpoint.rename(RQ_TRANSFORMER_NAMES, stacked=STACKED_NAMES)
    weights = _our_weights(checkpoint, model_config)
    if model_config.reads_code_vectors and vqvae is not None:
        precision = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
        weights["code_vectors"] = vqvae.quantizer.codebooks.detach().to(precision, copy=True)
    with torch.device("meta"):
        model = RQTransformerForImageGeneration(model_config)
    load_weights(model, weights, checkpoint, dtype)
    model.generation_config.update(**_sampling(settings.get("sampling") or {}, model_config.code_depth, config_file))
    return model


def is_rq_transformer(path: str | os.PathLike, use_ema: bool = False) -> bool:
    """Whether a checkpoint is an RQ-Transformer, by its keys; see [`read_checkpoint`] for the errors."""
    return read_checkpoint(path, use_ema).count(BLOCK_KEYS) > 0


def convert_prompt_tokenizer(
    vocab: str | os.PathLike, merges: str | os.PathLike, prompt_length: int
) -> PreTrainedTokenizerFast:
    """The text tokenizer of kakaobrain's text-conditional models: lower-cased BPE over characters.

    Args:
        vocab: its `bpe-16k-vocab.json`, of the repository's folder `rqvae/txtimg_datasets/tokenizers/pretrained`.
        merges: its `bpe-16k-merges.txt`.
        prompt_length: tokens of a prompt; shorter ones are padded, longer ones cut.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the vocabulary has no `[PAD]` or `[UNK]`.
    """
    for file in (vocab, merges):
        if not Path(file).is_file():
            raise FileNotFoundError(f"The text tokenizer needs its vocabulary and merges, there is no {file}.")
    tokens = read_json(vocab)
    if not {"[PAD]", "[UNK]"} <= set(tokens):
        raise ValueError(f"{vocab} must have the tokens [PAD] and [UNK], got {listed(tokens)}.")
    tokenizer = CharBPETokenizer.from_file(str(vocab), str(merges), unk_token="[UNK]", lowercase=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_max_length=prompt_length,
        padding_side="right",
        truncation_side="right",
    )


def original_rq_transformer(
    config: RQTransformerConfig, generation_config: GenerationConfig, weights: dict[str, Tensor]
) -> dict[str, Any]:
    """What the official files hold: the state dict of `model.pt` and the content of `config.yaml`.

    Raises:
        ValueError: the official code cannot compute this model.
    """
    check_official(
        {
            "`class_dropout_prob`": (config.class_dropout_prob, 0.0),
            "`layer_norm_eps`": (config.layer_norm_eps, 1e-5),
            "`intermediate_size`": (config.intermediate_size, 4 * config.hidden_size),
        }
    )
    weights = {name: weight for name, weight in weights.items() if name != "code_vectors"}
    if not config.tie_prediction_heads:
        heads = [weights.pop(f"heads.{k}.weight").T for k in range(config.code_depth)]
        weights["heads.0.weight"] = torch.stack(heads)
        biases = [weights[f"heads.{k}.bias"] for k in range(config.code_depth)]
        weights = {name: weight for name, weight in weights.items() if not name.startswith("heads.") or ".0." in name}
        weights["heads.0.bias"] = torch.stack(biases)
    state = {
        renamed(name, inverted(RQ_TRANSFORMER_NAMES)): weight[None] if name in POSITIONS else weight
        for name, weight in weights.items()
    }
    if "embed_codes.weight" in weights and not config.tie_code_embeddings:
        state["tok_emb.offsets"] = torch.arange(config.code_depth) * config.vocab_size
    content = {"arch": _original_arch(config), "dataset": {"vocab_size": config.vocab_size}}
    sampling = {
        "temp": generation_config.temperature,
        "top_k": generation_config.top_k,
        "top_p": generation_config.top_p,
    }
    content["sampling"] = {name: value for name, value in sampling.items() if value is not None}
    if config.prompt_length:
        weight = config.prompt_loss_weight
        content["loss"] = {"txt_weight": weight, "img_weight": 1 - weight}
    return {"model.pt": {"state_dict": state}, "config.yaml": content}


def _read_settings(path: Path) -> dict[str, Any]:
    """The content of a config.yaml, `arch` with the defaults of the official code."""
    if not path.is_file():
        raise FileNotFoundError(
            f"An RQ-Transformer needs its config.yaml, beside the checkpoint or named: none at {path}."
        )
    content = read_yaml(path)
    try:
        settings = dict(content)
        arch = settings["arch"] = {**ARCH_DEFAULTS, **settings["arch"]}
        arch.setdefault("vocab_size", (settings.get("dataset") or {}).get("vocab_size"))
        for name in ("body", "head"):
            arch[name] = {**arch[name], "block": {**BLOCK_DEFAULTS, **arch[name]["block"]}}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} must be YAML with `arch.body.block` and `arch.head.block`, it is not.") from error
    needed = [f"arch.{name}" for name in ("block_size", "embed_dim", "vocab_size") if not arch.get(name)]
    needed += [f"arch.{name}.n_layer" for name in ("body", "head") if "n_layer" not in arch[name]]
    needed += [f"arch.{name}.block.n_head" for name in ("body", "head") if "n_head" not in arch[name]["block"]]
    if needed:
        raise ValueError(f"{path} must have {listed(needed)}, it does not.")
    sizes = arch["block_size"]
    if not isinstance(sizes, list) or len(sizes) != 3 or not all(type(size) is int for size in sizes):
        raise ValueError(f"`arch.block_size` of {path} must be [height, width, depth], got {shown(sizes)}.")
    fixed = [("arch", arch, ARCH_FIXED)]
    for name in ("body", "head"):
        fixed.append((f"arch.{name}.block", arch[name]["block"], {**BLOCK_FIXED, "embed_dim": arch["embed_dim"]}))
    for part, values, only in fixed:
        for name, value in only.items():
            if values.get(name, value) != value:
                raise ValueError(f"`{part}.{name}` of {path} must be {value}, got {values[name]}.")
    return settings


def _check_counts(checkpoint: Checkpoint, arch: dict[str, Any], path: Path) -> None:
    """Raises ValueError unless the counts of the configuration, by which a model is built, are those of the tensors."""
    height, width, depth = arch["block_size"]
    conditions = arch["vocab_size_cond"]
    said_and_found = {
        "arch.body.n_layer": (arch["body"]["n_layer"], checkpoint.count(BLOCK_KEYS)),
        "arch.head.n_layer": (arch["head"]["n_layer"], checkpoint.count(r"head_transformer\.blocks\.(\d+)\.")),
        "arch.block_size, height * width": (height * width, checkpoint.shape("pos_emb_hw", 3)[1]),
        "arch.block_size, depth": (depth, checkpoint.shape("pos_emb_d", 3)[1]),
        "arch.vocab_size_cond": (conditions or 1, checkpoint.shape("cond_emb.weight", 2)[0]),
    }
    for name, (said, found) in said_and_found.items():
        agreed(f"`{name}`", {str(path): said, f"tensors of {checkpoint.path}": found})


def _model_config(
    settings: dict[str, Any], path: Path, vqvae: RQVAE | None, id2label: Mapping[int, str] | None
) -> RQTransformerConfig:
    arch = settings["arch"]
    body, head = arch["body"]["block"], arch["head"]["block"]
    height, width, depth = arch["block_size"]
    vocab_sizes = arch["vocab_size"] if isinstance(arch["vocab_size"], list) else [arch["vocab_size"]] * depth
    if len(set(vocab_sizes)) != 1 or len(vocab_sizes) != depth:
        raise ValueError(
            f"`arch.vocab_size` of {path} must be the same at all {depth} depths, got {shown(vocab_sizes)}."
        )
    if not {body["gelu"], head["gelu"]} <= ACTIVATIONS.keys():
        raise ValueError(f"`gelu` of {path} must be v1 or v2, got {body['gelu']} and {head['gelu']}.")
    dropouts = {
        name: agreed(f"`{name}` of {path}", {"arch.body.block": body[name], "arch.head.block": head[name]})
        for name in ("attn_pdrop", "resid_pdrop")
    }
    return RQTransformerConfig(
        vocab_size=vocab_sizes[0],
        hidden_size=arch["embed_dim"],
        num_hidden_layers=arch["body"]["n_layer"],
        num_depth_layers=arch["head"]["n_layer"],
        num_attention_heads=body["n_head"],
        num_depth_attention_heads=head["n_head"],
        hidden_act=ACTIVATIONS[body["gelu"]],
        depth_hidden_act=ACTIVATIONS[head["gelu"]],
        grid_size=(height, width),
        code_depth=depth,
        sum_code_vectors=arch["cumsum_depth_ctx"],
        tie_code_embeddings=arch["shared_tok_emb"],
        tie_prediction_heads=arch["shared_cls_emb"],
        embedding_dropout=arch["embd_pdrop"],
        attention_dropout=dropouts["attn_pdrop"],
        residual_dropout=dropouts["resid_pdrop"],
        **_code_vector_options(arch, path, vqvae),
        **_condition_options(settings, path, id2label),
    )


def _code_vector_options(arch: dict[str, Any], path: Path, vqvae: RQVAE | None) -> dict[str, Any]:
    """The arguments of the configuration that say what is read of the tokenizer."""
    options = dict(body_reads_code_vectors=arch["input_emb_vqvae"], depth_reads_code_vectors=arch["head_emb_vqvae"])
    if not any(options.values()):
        return options
    if vqvae is None:
        raise ValueError(f"`vqvae` must be given: {path} says that the model reads the tokenizer's code vectors.")
    count, _, size = vqvae.quantizer.codebooks.shape
    agreed(
        "The size of code vectors", {f"`arch.input_embed_dim` of {path}": arch.get("input_embed_dim"), "`vqvae`": size}
    )
    return dict(**options, shared_codebook=count == 1, code_vector_size=size)


def _condition_options(settings: dict[str, Any], path: Path, id2label: Mapping[int, str] | None) -> dict[str, Any]:
    """The arguments of the configuration that say what the model is conditioned on."""
    arch, loss = settings["arch"], settings.get("loss") or {}
    conditions, tokens = max(arch["vocab_size_cond"] or 0, 1), max(arch["block_size_cond"] or 0, 1)
    if tokens == 1:
        if id2label is None and conditions == 1000:
            id2label = dict(enumerate(read_json(IMAGENET_LABELS)))
        return dict(num_classes=conditions, id2label=id2label and dict(id2label))
    if id2label is not None:
        raise ValueError(f"`id2label` must be None: the model of {path} has prompts, not classes.")
    weight = loss.get("txt_weight", 0.1)
    if abs(weight + loss.get("img_weight", 1 - weight) - 1) > 1e-9:
        raise ValueError(f"`loss.txt_weight` and `loss.img_weight` of {path} must sum to 1, got {loss}.")
    return dict(num_classes=0, prompt_length=tokens, prompt_vocab_size=conditions, prompt_loss_weight=weight)


def _our_weights(checkpoint: Checkpoint, config: RQTransformerConfig) -> dict[str, Tensor]:
    """The weights with our names and shapes; what does not fit is left for `load_weights` to refuse."""
    weights = dict(checkpoint.tensors)
    offsets = weights.pop("embed_codes.offsets", None)
    if offsets is not None and not torch.equal(offsets, torch.arange(config.code_depth) * config.vocab_size):
        raise ValueError(
            f"`tok_emb.offsets` of {checkpoint.path} must be multiples of {config.vocab_size}, got {offsets.tolist()}."
        )
    for name in POSITIONS:
        if name in weights and weights[name].ndim == 3 and len(weights[name]) == 1:
            weights[name] = weights[name][0]
    if not config.tie_prediction_heads:
        for name in ("heads.0.weight", "heads.0.bias"):
            if name in weights and len(weights[name]) == config.code_depth:
                stacked = weights.pop(name)
                for k, weight in enumerate(stacked):
                    weights[name.replace("0", str(k))] = weight.T.contiguous() if weight.ndim == 2 else weight
    return weights


def _sampling(sampling: Mapping[str, Any], depth: int, path: Path) -> dict[str, Any]:
    """The `sampling` of a config.yaml as settings of `generate`."""
    settings = {}
    for theirs, ours in (("temp", "temperature"), ("top_k", "top_k"), ("top_p", "top_p")):
        value = sampling.get(theirs)
        if isinstance(value, list) and len(value) not in (1, depth):
            raise ValueError(
                f"`sampling.{theirs}` of {path} must be one value or one per depth ({depth}), got {value}."
            )
        if value is not None:
            settings[ours] = value[0] if isinstance(value, list) and len(value) == 1 else value
    return settings


def _original_arch(config: RQTransformerConfig) -> dict[str, Any]:
    names = inverted(ACTIVATIONS)
    dropouts = dict(attn_pdrop=config.attention_dropout, resid_pdrop=config.residual_dropout)
    block = dict(embed_dim=config.hidden_size, **BLOCK_FIXED, **dropouts)
    body = dict(n_head=config.num_attention_heads, gelu=names[config.hidden_act], **block)
    head = dict(
        n_head=config.num_depth_attention_heads, gelu=names[config.depth_hidden_act or config.hidden_act], **block
    )
    return dict(
        **ARCH_FIXED,
        block_size=[*as_grid(config.grid_size), config.code_depth],
        vocab_size=config.vocab_size,
        embed_dim=config.hidden_size,
        input_embed_dim=config.code_vector_size,
        vocab_size_cond=config.num_conditions,
        block_size_cond=max(config.prompt_length, 1),
        input_emb_vqvae=config.body_reads_code_vectors,
        head_emb_vqvae=config.depth_reads_code_vectors,
        cumsum_depth_ctx=config.sum_code_vectors,
        shared_tok_emb=config.tie_code_embeddings,
        shared_cls_emb=config.tie_prediction_heads,
        embd_pdrop=config.embedding_dropout,
        body=dict(n_layer=config.num_hidden_layers, block=body),
        head=dict(n_layer=config.num_depth_layers, block=head),
    )
