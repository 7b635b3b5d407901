"""What a page that strangers use allows, and how it says no: a message in the page, never a traceback."""

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr
from transformers.hf_argparser import HfArg


logger = logging.getLogger(__name__)

SEEDS = 2**32
FAILED = "This did not work, for a reason that only the log of the server says."


@dataclass
class Limits:
    """The most that one visitor can ask for."""

    max_particles: int = HfArg(default=16, help="Particles, when a part of an image is filled in.")
    max_candidates: int = HfArg(default=8, help="Candidates of which the best is shown.")
    max_classified_labels: int = HfArg(
        default=200, help="A model of more labels does not classify uploads: each label costs one pass."
    )
    max_prompt_characters: int = HfArg(default=500, help="Length of a prompt, for models that read text.")
    max_upload_megabytes: int = HfArg(default=8, help="Size of an uploaded file.")
    max_upload_megapixels: int = HfArg(default=25, help="Pixels of an uploaded image, in millions.")

    def __post_init__(self):
        for name, value in vars(self).items():
            if name.startswith("max_") and value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}.")

    @property
    def max_pixels(self) -> int:
        return self.max_upload_megapixels * 1_000_000


def check_whole(name: str, value: float | None, most: int, least: int = 1) -> int:
    """The whole number. The page's controls have these bounds too, but a visitor need not use the controls.

    Raises:
        ValueError: it is none, or outside `[least, most]`.
    """
    if not isinstance(value, int | float) or not least <= value <= most or value != int(value):
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value}.")
    return int(value)


def as_message(action: Callable) -> Callable:
    """What an action of the page raises becomes a message in the page.

    A ValueError says what is wrong with the input. Any other error goes to the server's log and is not shown: it may
    name files of the server.
    """

    def message(error: Exception) -> gr.Error:
        if isinstance(error, ValueError):
            return gr.Error(str(error), title="Please check", print_exception=False)
        logger.error("An action of the page failed.", exc_info=error)
        return gr.Error(FAILED, title="Error", print_exception=False)

    if inspect.isgeneratorfunction(action):

        @functools.wraps(action)
        def guarded(*args, **kwargs):
            try:
                yield from action(*args, **kwargs)
            except gr.Error:
                raise
            except Exception as error:
                raise message(error) from error
    else:

        @functools.wraps(action)
        def guarded(*args, **kwargs):
            try:
                return action(*args, **kwargs)
            except gr.Error:
                raise
            except Exception as error:
                raise message(error) from error

    return guarded
