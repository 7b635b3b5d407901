"""The sampling settings of a call: its arguments, completed from a generation config, checked, one value a depth."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from types import SimpleNamespace

import torch
from transformers import GenerationConfig

from .guidance import GUIDANCE_SCHEDULES


@dataclass(frozen=True)
class SamplingSettings:
    """How codes are drawn. Equal settings compare and hash equal.

    Args:
        guidance_scale: at least 0; 1 is no guidance.
        guidance_schedule: one of `GUIDANCE_SCHEDULES`.
        guidance_power: of the schedule `"power-cosine"`; greater than 0.
        do_sample: False takes the most likely code (greedy).
        temperature, top_k, top_p: one for each depth; 1, 0 and 1 change nothing.
    """

    guidance_scale: float
    guidance_schedule: str
    guidance_power: float
    do_sample: bool
    temperature: tuple[float, ...]
    top_k: tuple[int, ...]
    top_p: tuple[float, ...]

    @property
    def guided(self) -> bool:
        """Whether each image needs a second sequence, of the null condition."""
        return self.guidance_scale != 1

    @classmethod
    def resolve(cls, config, generation_config: GenerationConfig, **arguments) -> "SamplingSettings":
        """The settings of a call of `generate`.

        Args:
            config: of the model; its `code_depth` and `has_null_class` are read.
            generation_config: gives what the arguments leave None; what it leaves open, too, is guidance 2 (1 without
                a null class), constant, temperature 1, no filters, sampling.
            arguments: the fields of this class by name. A value for all depths, or a list of one for each.

        Raises:
            ValueError: a value out of its range; the message names it.
        """
        defaults = dict(
            guidance_scale=2.0 if config.has_null_class else 1.0,
            guidance_schedule="constant",
            guidance_power=2.75,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
        values = {}
        for name, default in defaults.items():
            given = (arguments.pop(name, None), getattr(generation_config, name, None), default)
            values[name] = next(value for value in given if value is not None)
        if arguments:
            raise TypeError(f"unknown sampling settings: {', '.join(arguments)}")

        largest = torch.finfo(torch.float32).max
        scale = checked_number(
            "guidance_scale", values["guidance_scale"], "finite and at least 0", lambda v: 0 <= v <= largest
        )
        if scale != 1 and not config.has_null_class:
            raise ValueError(
                "`guidance_scale` must be 1 for a model without a null class (`class_dropout_prob` 0), got"
                f" {values['guidance_scale']}."
            )
        schedule, depth = values["guidance_schedule"], config.code_depth
        if schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(f"`guidance_schedule` must be one of {GUIDANCE_SCHEDULES}, got {schedule!r}.")
        power = checked_number("guidance_power", values["guidance_power"], "finite and greater than 0", lambda v: v > 0)
        temperature = per_depth(
            "temperature", values["temperature"], depth, "finite and greater than 0", lambda v: v > 0
        )
        top_k = per_depth(
            "top_k", values["top_k"], depth, "a whole number, at least 0", lambda v: v >= 0 and v == int(v)
        )
        top_p = per_depth("top_p", values["top_p"], depth, "within (0, 1]", lambda v: 0 < v <= 1)
        return cls(
            guidance_scale=scale,
            guidance_schedule=schedule,
            guidance_power=power,
            do_sample=bool(values["do_sample"]),
            temperature=temperature,
            top_k=tuple(map(int, top_k)),
            top_p=top_p,
        )

    @staticmethod
    def check(**arguments) -> None:
        """Raises the ValueError of [`resolve`] for arguments that no model takes, where none is loaded yet."""
        any_model = SimpleNamespace(code_depth=1, has_null_class=True)
        SamplingSettings.resolve(any_model, GenerationConfig(), **arguments)


def per_depth(name: str, value, depth: int, allowed: str, check: Callable[[float], bool]) -> tuple[float, ...]:
    """One number for each depth, from a number or a list, tuple, array or tensor of `depth` numbers."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    values = list(value) if isinstance(value, (list, tuple)) else [value] * depth
    if len(values) != depth:
        raise ValueError(f"`{name}` must be one value or one per depth ({depth}), got {len(values)}: {values}.")
    return tuple(checked_number(name, one, allowed, check) for one in values)


def checked_number(name: str, value, allowed: str, check: Callable[[float], bool]) -> float:
    """The number as a float, where it is a finite one for which `check` holds (NumPy's numbers are numbers)."""
    try:
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        number = False
    if not number or not check(value):
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
    return float(value)
