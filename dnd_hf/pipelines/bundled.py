"""The code that `DiffusionPipeline.from_pretrained` runs for a bundled folder, which holds none: the installed package.

The folder's `model_index.json` names this file, and the modules of the models.
"""

from dnd_hf import DnDPipeline


__all__ = ["DnDPipeline"]
