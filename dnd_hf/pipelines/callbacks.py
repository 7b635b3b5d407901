"""What a user's function sees after each position of the grid, and what it may do."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor


CALLBACK_TENSORS = ("codes",)
StepCallback = Callable[[Any, int, int, dict], dict | None]


def checked_tensor_inputs(callback: StepCallback | None, tensor_inputs: Sequence[str]) -> Sequence[str]:
    """The names of the tensors that the function gets; a `PipelineCallback` of diffusers says so itself.

    Raises:
        ValueError: a name that is not of `CALLBACK_TENSORS`.
    """
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        tensor_inputs = callback.tensor_inputs
    unknown = [name for name in tensor_inputs if name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be of {list(CALLBACK_TENSORS)}, got {unknown}.")
    return tensor_inputs


def call_after_step(
    callback: StepCallback | None, tensor_inputs: Sequence[str], pipe: Any, step: int, codes: Tensor
) -> bool:
    """Calls the function with copies of the codes so far; whether the sampling is to end.

    Raises:
        ValueError: it returned other codes: the next position has already read them.
    """
    if callback is not None:
        tensors = {name: codes.clone() for name in tensor_inputs}
        returned = (callback(pipe, step, step, tensors) or {}).get("codes", codes)
        if returned is not codes and not torch.equal(returned, codes):
            raise ValueError("`callback_on_step_end` must not change the codes: they cannot be replaced.")
    return pipe.interrupt


def step_function(
    callback: StepCallback | None, tensor_inputs: Sequence[str], pipe: Any, progress: Any
) -> Callable[[int, Tensor], bool]:
    """What `generate` is to call after each position: [`call_after_step`], and then a step of the progress bar."""

    def on_step(step: int, codes: Tensor) -> bool:
        ended = call_after_step(callback, tensor_inputs, pipe, step, codes)
        progress.update()
        return ended

    return on_step
