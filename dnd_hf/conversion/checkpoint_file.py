"""The official checkpoint file: reading it safely, renaming its tensors, and checks that all conversions share."""

import argparse
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.number_checks import height_width


# Buffers that some checkpoints carry along; nothing in them was learned.
NOT_WEIGHTS = re.compile(r"(^|\.)(freqs_cis|causal_mask|kv_cache\.[kv]_cache|codebook_used)$")
WRAPPERS = ("model", "module", "state_dict")  # as DDP, DeepSpeed and the RQ-VAEs' trainer save
EMA_WRAPPERS = ("ema", "state_dict_ema")
WRAPPER_PREFIX = re.compile(r"^((module|_orig_mod)\.)+")  # of DDP and torch.compile


@dataclass
class Checkpoint:
    """What an official file holds.

    Args:
        path: the file.
        tensors: the weights, memory-mapped.
        args: the training arguments stored with them, empty where there are none.
        rotary_shape: `(1 + cells, head_dim / 2, 2)` of the rotary table, where it was saved too.
        names: table from the official names to those of `tensors`.
        levels: number of resolutions, where the decoder's levels are counted from the other end.
        stacked: regular expressions of names of the model that are no tensor of their own in the file, and what
            replaces them there.
    """

    path: Path
    tensors: dict[str, Tensor]
    args: dict[str, Any] = field(default_factory=dict)
    rotary_shape: tuple[int, ...] | None = None
    names: dict[str, str] = field(default_factory=dict)
    levels: int = 0
    stacked: dict[str, str] = field(default_factory=dict)

    def rename(self, names: dict[str, str], levels: int = 0, stacked: dict[str, str] | None = None) -> None:
        """Renames all tensors to our names; the arguments are the fields."""
        self.names, self.levels, self.stacked = names, levels, stacked or {}
        self.tensors = {mirrored(renamed(name, names), levels): tensor for name, tensor in self.tensors.items()}

    def official_name(self, name: str) -> str:
        """The name in the file of a tensor of the model."""
        for pattern, replacement in self.stacked.items():
            name = re.sub(pattern, replacement, name)
        return renamed(mirrored(name, self.levels), inverted(self.names))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which must be there."""
        if name not in self.tensors:
            found = listed([self.official_name(other) for other in self.tensors])
            raise ValueError(f"{self.path} must have the key `{self.official_name(name)}`, got {found}.")
        return tuple(self.tensors[name].shape)

    def count(self, pattern: str) -> int:
        """How many numbers from 0 up to the largest the group of `pattern` matches in the names."""
        matches = (re.match(pattern, name) for name in self.tensors)
        return max((int(match[1]) + 1 for match in matches if match), default=0)


def read_checkpoint(path: str | os.PathLike, use_ema: bool) -> Checkpoint:
    """Opens an official file without running anything in it; `use_ema`: the averaged weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of tensors, or could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The checkpoint must be a file, there is none at {path}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            mappable = zipfile.is_zipfile(path)  # files from before torch 1.6 are not
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # what is no pickle may fail in any way
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for `{code[1]}`, which could run code" if code else "it is damaged, or something else"
        raise ValueError(f"{path} must be a PyTorch checkpoint of tensors and plain values: {reason}.") from error

    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}.")
    wrappers = EMA_WRAPPERS if use_ema else WRAPPERS
    wrapper = next((key for key in wrappers if isinstance(content.get(key), dict)), None)
    if use_ema and wrapper is None:
        raise ValueError(
            f"{path} must have averaged weights under {' or '.join(wrappers)}, got keys {listed(content)}."
        )
    tensors = content[wrapper] if wrapper else content
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(
            f"{path} must have tensors under {', '.join(wrappers)} or at the top, got keys {listed(tensors)}."
        )
    tensors = {WRAPPER_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return Checkpoint(
        path,
        {name: tensor for name, tensor in tensors.items() if not NOT_WEIGHTS.search(name)},
        args if isinstance(args, dict) else {},
        tuple(tensors["freqs_cis"].shape) if "freqs_cis" in tensors else None,
    )


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], checkpoint: Checkpoint, dtype: torch.dtype | None
) -> None:
    """Puts the weights into a model without any; floating ones get `dtype`, apart from the quantizer's.

    Raises:
        ValueError: missing or surplus weights, or other shapes; named as in the file.
    """
    expected = model.state_dict()
    problems = {
        "missing keys": expected.keys() - weights.keys(),
        "surplus keys": weights.keys() - expected.keys(),
        "other shapes": {k for k in expected.keys() & weights.keys() if expected[k].shape != weights[k].shape},
    }
    problems = {
        what: sorted({checkpoint.official_name(key) for key in keys}) for what, keys in problems.items() if keys
    }
    if problems:
        found = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items())
        raise ValueError(f"{checkpoint.path} must have the weights that its sizes ask for and no others, got {found}.")
    for name, weight in weights.items():
        if name.startswith("quantizer."):
            weights[name] = weight.float() if weight.is_floating_point() else weight
        elif dtype is not None:
            weights[name] = weight.to(dtype)
    model.load_state_dict(weights, assign=True)
    model.eval()


def renamed(name: str, names: dict[str, str]) -> str:
    """A name with the parts that the table has replaced, in the order of the table."""
    name = f".{name}"
    for old, new in names.items():
        name = name.replace(old, new)
    return name[1:]


def inverted(names: dict[str, str]) -> dict[str, str]:
    """The table for the way back."""
    return {new: old for old, new in names.items()}


def mirrored(name: str, levels: int) -> str:
    """A name whose decoder level, if it has one, is counted from the other end of `levels`; 0 levels: as it is."""
    if not levels:
        return name
    return re.sub(r"(?<=decoder\.up_blocks\.)\d+", lambda level: str(levels - 1 - int(level[0])), name)


def listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    """The first few names, and how many more there are, for an error."""
    names = list(names)
    return ", ".join(f"`{name}`" for name in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def agreed(what: str, claims: dict[str, Any]) -> Any:
    """The one value that all claims, `{who says it: value}`, agree on; `None` claims nothing."""
    claims = {source: value for source, value in claims.items() if value is not None}
    values = list(claims.values())
    if any(value != values[0] for value in values):
        said = ", ".join(f"{value} ({source})" for source, value in claims.items())
        raise ValueError(f"{what} must be the same everywhere, got {said}.")
    return values[0] if values else None


def as_grid(grid_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a grid; one number for a square."""
    return height_width("grid_size", grid_size)


def check_official(values: dict[str, tuple[Any, Any]]) -> None:
    """Raises ValueError unless each value, `{name: (value, what the official code has)}`, is the official one."""
    for name, (value, fixed) in values.items():
        if value != fixed:
            raise ValueError(f"{name} must be {fixed} for the official code, got {value}.")
