"""The official files: reading them safely, renaming tensors, and checks that all conversions share."""

import argparse
import math
import os
import re
import reprlib
import textwrap
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ..ops.number_checks import height_width


# Buffers that some checkpoints carry along; nothing in them was learned.
NOT_WEIGHTS = re.compile(r"(^|\.)(freqs_cis|causal_mask|kv_cache\.[kv]_cache|codebook_used)$")
WRAPPERS = ("model", "module", "state_dict")  # as DDP, DeepSpeed and the RQ-VAEs' trainer save
EMA_WRAPPERS = ("ema", "state_dict_ema")
SHORT_REPR = reprlib.Repr()
SHORT_REPR.maxlevel = 2
MAX_CONFIG_SIZE = 2**20  # bytes
MAX_CELLS = 2**20  # of a code grid; a larger one is a mistake, or meant to exhaust memory
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

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor, which must be there and have `dims` dimensions."""
        if name not in self.tensors:
            found = listed([self.official_name(other) for other in self.tensors])
            raise ValueError(f"{self.path} must have the key `{self.official_name(name)}`, got {found}.")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dims:
            raise ValueError(
                f"`{self.official_name(name)}` of {self.path} must have {dims} dimensions, got shape {shape}."
            )
        return shape

    def count(self, pattern: str) -> int:
        """How many numbers the group of `pattern` matches in the names, which must be 0, 1, ... without a gap."""
        try:
            return count_numbers(self.tensors, pattern)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def argument(self, name: str, *kinds: type, default: Any = None) -> Any:
        """A training argument, of one of these types; `default` where there is none."""
        value = self.args.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"`args.{name}` of {self.path} must be {expected}, got {shown(value)}.")
        return value


def read_checkpoint(path: str | os.PathLike, use_ema: bool) -> Checkpoint:
    """Opens an official file without running anything in it; `use_ema`: the averaged weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of tensors, could run code, or would unpack to more than the file holds.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The checkpoint must be a file, there is none at {path}.")
    content = _read_safely(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}.")
    wrappers = EMA_WRAPPERS if use_ema else WRAPPERS
    wrapper = next((key for key in wrappers if isinstance(content.get(key), dict)), None)
    if use_ema and wrapper is None:
        raise ValueError(
            f"{path} must have averaged weights under {' or '.join(wrappers)}, got keys {listed(content)}."
        )
    tensors = content[wrapper] if wrapper else content
    if not tensors or not all(isinstance(n, str) and isinstance(tensor, Tensor) for n, tensor in tensors.items()):
        raise ValueError(
            f"{path} must have tensors under {', '.join(wrappers)} or at the top, got keys {listed(tensors)}."
        )
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"`{name}` of {path} must be a dense tensor that lies in the file as large as it is.")
    tensors = {WRAPPER_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return Checkpoint(
        path,
        {name: tensor for name, tensor in tensors.items() if not NOT_WEIGHTS.search(name)},
        args if isinstance(args, dict) else {},
        _rotary_shape(path, tensors),
    )


def _rotary_shape(path: Path, tensors: dict[str, Tensor]) -> tuple[int, ...] | None:
    shape = tuple(tensors["freqs_cis"].shape) if "freqs_cis" in tensors else None
    if shape is not None and (len(shape) != 3 or shape[0] < 2):
        raise ValueError(f"`freqs_cis` of {path} must be (1 + cells, head_dim / 2, 2), got shape {shape}.")
    return shape


def _read_safely(path: Path) -> Any:
    try:
        mappable = zipfile.is_zipfile(path)  # files from before torch 1.6 are not
        if mappable:
            with zipfile.ZipFile(path) as file:
                if sum(member.file_size for member in file.infolist()) > path.stat().st_size:
                    raise ValueError("torch.save compresses nothing")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # what is no pickle may fail in any way
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for `{code[1]}`, which could run code" if code else "it is damaged, or something else"
        raise ValueError(f"{path} must be a PyTorch checkpoint of tensors and plain values: {reason}.") from error


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, a few of which can stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """The content of a configuration file, plain values only.

    Raises:
        ValueError: it is larger than any such file, no YAML, or has aliases.
    """
    if path.stat().st_size > MAX_CONFIG_SIZE:
        raise ValueError(f"{path} must be at most {MAX_CONFIG_SIZE} bytes, got {path.stat().st_size}.")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(f"{path} must be YAML of plain values, it is not: {reason}") from error


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
    named = {what: sorted({checkpoint.official_name(key) for key in keys}) for what, keys in problems.items() if keys}
    if named:
        found = "; ".join(f"{what}: {listed(names)}" for what, names in named.items())
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

    def other_end(level: re.Match) -> str:
        return str(levels - 1 - int(level[0])) if int(level[0]) < levels else level[0]

    return re.sub(r"(?<=decoder\.up_blocks\.)\d{1,9}(?!\d)", other_end, name)


def shown(value: Any) -> str:
    """A value for an error, in a line however large it is."""
    return SHORT_REPR.repr(value)


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are, for an error."""
    names = list(names)
    first = ", ".join(f"`{textwrap.shorten(str(name), 100)}`" for name in names[:6])
    return first + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def count_numbers(names: Iterable[str], pattern: str) -> int:
    """How many numbers the group of `pattern` matches at the start of the names.

    Raises:
        ValueError: they are not 0, 1, ... without a gap; so the count is never more than that of the names.
    """
    found = {match[1] for match in (re.match(pattern, name) for name in names) if match}
    surplus = found - {str(number) for number in range(len(found))}
    if surplus:
        one = textwrap.shorten(max(surplus), 20)
        raise ValueError(f"the {len(found)} numbers of `{pattern}` must be 0, 1, ... without a gap, got {one}.")
    return len(found)


def agreed(what: str, claims: dict[str, Any]) -> Any:
    """The one value that all claims, `{who says it: value}`, agree on; `None` claims nothing."""
    claims = {source: value for source, value in claims.items() if value is not None}
    values = list(claims.values())
    if any(value != values[0] for value in values):
        said = ", ".join(f"{shown(value)} ({source})" for source, value in claims.items())
        raise ValueError(f"{what} must be the same everywhere, got {said}.")
    return values[0] if values else None


def as_grid(grid_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a grid; one number for a square."""
    grid = height_width("grid_size", grid_size)
    if math.prod(grid) > MAX_CELLS:
        raise ValueError(f"The code grid must have at most {MAX_CELLS} cells, got {grid}.")
    return grid


def check_official(values: dict[str, tuple[Any, Any]]) -> None:
    """Raises ValueError unless each value, `{name: (value, what the official code has)}`, is the official one."""
    for name, (value, fixed) in values.items():
        if value != fixed:
            raise ValueError(f"{name} must be {fixed} for the official code, got {value}.")


def check_sizes(config: Mapping[str, Any], **allowed: Sequence[int]) -> None:
    """Raises ValueError unless each of these sizes of a configuration is one that the weights can have."""
    for name, sizes in allowed.items():
        if type(config.get(name)) is not int or config[name] not in sizes:
            expected = " or ".join(map(str, sizes)) if len(sizes) < 3 else f"{sizes[0]} to {sizes[-1]}"
            raise ValueError(f"`{name}` must be {expected} as the weights are, got {shown(config.get(name))}.")
