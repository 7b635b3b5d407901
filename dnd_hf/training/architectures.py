"""The architectures that train.py trains: their classes, the options that each has, and the settings of its paper."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..models.autoencoder_rqvae import RQVAE
from ..models.configuration_dnd import SIZES, DnDConfig
from ..models.configuration_rq_transformer import RQ_TRANSFORMER_SIZES, RQTransformerConfig
from ..models.modeling_dnd import DnDForImageGeneration
from ..models.modeling_rq_transformer import RQTransformerForImageGeneration


@dataclass(frozen=True)
class Architecture:
    """How a kind of transformer is made and trained.

    Args:
        config_class, model_class: of the model.
        sizes: names for `config_class.from_size`.
        default_size: one of them.
        options: arguments of the configuration, each with its default; None: that of the size.
        learning_rate: the paper's peak learning rate, from the samples of one optimizer step.
        weight_decay: the paper's.
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    sizes: tuple[str, ...]
    default_size: str
    options: Mapping[str, Any]
    learning_rate: Callable[[int], float]
    weight_decay: float

    def make(self, size: str, options: Mapping[str, Any], vqvae: RQVAE, **data: Any) -> PreTrainedModel:
        """A new model that predicts the codes of a tokenizer; `data`: further arguments of the configuration."""
        if self.config_class is RQTransformerConfig:
            data |= dict(code_vector_size=vqvae.quantizer.dim, shared_codebook=vqvae.quantizer.shared)
        config = self.config_class.from_size(
            size,
            vocab_size=vqvae.config.num_vq_embeddings,
            code_depth=vqvae.config.code_depth,
            **{name: value for name, value in options.items() if name in self.options and value is not None},
            **data,
        )
        if isinstance(config, DnDConfig) and config.prediction_layers[-1] != config.num_hidden_layers - 1:
            raise ValueError("the last of `prediction_layers` must be the last layer; layers above it learn nothing.")
        model = self.model_class(config)
        if isinstance(model, RQTransformerForImageGeneration):
            model.set_code_vectors(vqvae.quantizer.codebooks)
        return model


SHARED_OPTIONS = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
ARCHITECTURES = {
    "dnd": Architecture(
        DnDConfig,
        DnDForImageGeneration,
        tuple(SIZES),
        "B",
        dict(
            **SHARED_OPTIONS,
            num_key_value_heads=None,
            prediction_layers=None,
            depth_mode="dnd",
            tie_prediction_heads=False,
            class_dropout_prob=0.1,
            embedding_dropout=0.1,
            residual_dropout=0.1,
            mlp_dropout=0.1,
            drop_path_rate=0.0,
            initializer_range=0.02,
        ),
        learning_rate=lambda samples: 1e-4 * samples / 256,
        weight_decay=0.05,
    ),
    "rq_transformer": Architecture(
        RQTransformerConfig,
        RQTransformerForImageGeneration,
        tuple(RQ_TRANSFORMER_SIZES),
        "480M",
        dict(
            **SHARED_OPTIONS,
            num_depth_layers=None,
            num_depth_attention_heads=None,
            tie_prediction_heads=True,
            class_dropout_prob=0.0,
            embedding_dropout=0.0,
            residual_dropout=0.1,
            initializer_range=0.02,
        ),
        learning_rate=lambda samples: 5e-4,
        weight_decay=1e-4,
    ),
}
