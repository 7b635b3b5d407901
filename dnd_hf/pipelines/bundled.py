"""The code that `DiffusionPipeline.from_pretrained` runs for a bundled folder, which holds none: the installed package.

The folder's `model_index.json` names this file, and the modules of the models, which must have been imported by then.
"""

from dnd_hf import RQVAE, DnDForImageGeneration, DnDPipeline


__all__ = ["RQVAE", "DnDForImageGeneration", "DnDPipeline"]
