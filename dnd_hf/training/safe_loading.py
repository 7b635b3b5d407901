"""Checkpoints hold pickles, which can run code: they are read here as data only before Accelerate loads them."""

import io
import pickle
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.serialization import safe_globals


PICKLES = (".bin", ".pkl", ".pt")
"""What Accelerate and DeepSpeed unpickle; sharded weights (.distcp) as their `.metadata` says."""

SHARDED = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "device"),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "builtins": ("set",),
}
"""In which PyTorch describes a sharded checkpoint, beside the dtypes."""

DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
"""What DeepSpeed's checkpoints hold beside tensors."""


def check_pickles(checkpoint: Path) -> None:
    """Reads every pickle of a checkpoint without running what it names; nothing is kept.

    Raises:
        ValueError: a file is something other than tensors, numbers and containers of them, so that loading it could
            run code, or it is damaged.
    """
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.name.endswith(".metadata"):
                _check_shards(path)
            elif path.suffix in PICKLES:
                with safe_globals(_deepspeed_classes()):
                    load(str(path), map_location="cpu", mmap=True)
        except Exception as error:  # whatever a hostile file leads to
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path} is not loaded, because it could run code, or is damaged: {reason}") from error


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in SHARDED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _deepspeed_classes() -> list[Any]:
    """Those of `DEEPSPEED`, where it is in use."""
    if "deepspeed" not in sys.modules:
        return []
    return [getattr(import_module(module), name) for module, names in DEEPSPEED.items() for name in names]


def _check_shards(path: Path) -> None:
    """The description of a sharded checkpoint, and what it holds beside tensors, which PyTorch unpickles whole."""
    with path.open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (path.parent / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                load(io.BytesIO(file.read(place.length)), map_location="cpu")
