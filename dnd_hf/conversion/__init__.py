"""Official checkpoints in, this package's models out, and back again."""

from .pipeline import convert_pipeline, convert_rqvae, convert_transformer, export_original


__all__ = ["convert_pipeline", "convert_rqvae", "convert_transformer", "export_original"]
