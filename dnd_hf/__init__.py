"""dnd_hf: the DnD-Transformer (arXiv 2410.01912) for transformers and diffusers."""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel

from .models.configuration_dnd import DnDConfig
from .models.configuration_rq_transformer import RQTransformerConfig
from .models.modeling_dnd import DnDForImageGeneration, DnDOutput
from .models.modeling_rq_transformer import RQTransformerForImageGeneration, RQTransformerOutput


if TYPE_CHECKING:
    from .bundled import bundled_checkpoint
    from .conversion import convert_rq_transformer, convert_rqvae, convert_transformer
    from .models.autoencoder_rqvae import RQVAE, RQVAEEncoderOutput, RQVAEOutput
    from .models.residual_quantizer import ResidualQuantizer
    from .pipelines.pipeline_dnd import DnDPipeline

__version__ = "0.1.0"

_LAZY = {
    "models.autoencoder_rqvae": ("RQVAE", "RQVAEEncoderOutput", "RQVAEOutput"),
    "models.residual_quantizer": ("ResidualQuantizer",),
    "pipelines.pipeline_dnd": ("DnDPipeline",),
    "bundled": ("bundled_checkpoint",),
    "conversion": ("convert_rq_transformer", "convert_rqvae", "convert_transformer"),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}
__all__ = [
    "DnDConfig",
    "DnDForImageGeneration",
    "DnDOutput",
    "RQTransformerConfig",
    "RQTransformerForImageGeneration",
    "RQTransformerOutput",
    *_MODULE_OF,
]

AutoConfig.register(DnDConfig.model_type, DnDConfig)
AutoModel.register(DnDConfig, DnDForImageGeneration)
AutoConfig.register(RQTransformerConfig.model_type, RQTransformerConfig)
AutoModel.register(RQTransformerConfig, RQTransformerForImageGeneration)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
