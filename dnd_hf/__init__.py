"""dnd_hf: the DnD-Transformer (arXiv 2410.01912) for transformers and diffusers."""

from importlib import import_module


__version__ = "0.1.0"

_PUBLIC = {
    "configuration_dnd": ("DnDConfig",),
    "modeling_dnd": ("DnDForImageGeneration", "DnDOutput"),
    "autoencoder_rqvae": ("RQVAE", "RQVAEEncoderOutput", "RQVAEOutput"),
    "quantization": ("ResidualQuantizer",),
    "pipeline_dnd": ("DnDPipeline",),
    "checkpoints": ("bundled_checkpoint",),
    "conversion": ("convert_rqvae", "convert_transformer"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
