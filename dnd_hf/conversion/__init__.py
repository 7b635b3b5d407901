"""Official checkpoints in, this package's models out, and back again."""

from .pipeline import convert_any_transformer, convert_pipeline, export_original
from .rq_transformer import convert_prompt_tokenizer, convert_rq_transformer
from .tokenizer import convert_rqvae
from .transformer import convert_transformer


__all__ = [
    "convert_any_transformer",
    "convert_pipeline",
    "convert_prompt_tokenizer",
    "convert_rq_transformer",
    "convert_rqvae",
    "convert_transformer",
    "export_original",
]
