# /// script
# requires-python = ">=3.11"
# dependencies = ["dnd-hf[demo]"]
#
# [tool.uv.sources]
# dnd-hf = { path = "..", editable = true }
# ///
"""A page in the browser to play with a model: make images, look inside, fill in a part, read an upload.

python examples/app.py
python examples/app.py --models words dnd-b you/model
python examples/app.py --share
python examples/app.py --export_space my-space
"""

import os
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from dnd_hf.bundled import bundled_names
from dnd_hf.command_line import run_script


# Before Gradio is imported: it asks for newer versions and reports its use otherwise.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    from demo.limits import Limits
    from demo.models import Models
    from demo.page import build_page, serving
    from demo.space import export_space
except ImportError as error:
    raise SystemExit(f"app.py: error: {error} (pip install '.[demo]' in a clone of dnd_hf)") from error

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def offered_models() -> list[str]:
    """The default of `models`; a Space, which has no command line, says it by its variable. The page opens with
    the first."""
    return os.environ.get("DND_HF_MODELS", "").split() or sorted(bundled_names(), key=lambda name: name != "words")


@dataclass
class AppArguments(Limits):
    """Options of this script; they can also be in a YAML file given as `--config`."""

    models: list[str] = HfArg(
        default_factory=offered_models,
        help="What can be chosen: bundled models, pipeline folders, Hub ids; default: those that the environment"
        " variable DND_HF_MODELS names, with spaces between them, or all bundled ones.",
    )
    allow_other_models: bool = HfArg(
        default=False, help="Let the page load any Hub id that is typed in; not on a page that others can reach."
    )
    share: bool = HfArg(default=False, help="Make a public link for a week, by a server of Gradio.")
    host: str | None = HfArg(default=None, help="Address to listen at; default: this machine only, in a Space all.")
    port: int | None = HfArg(default=None, help="Default: the first free one from 7860.")
    device: str | None = HfArg(default=None, help="Default: a GPU where there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(default="float32", help="Precision of the models.")
    concurrency: int = HfArg(default=1, help="Actions that run a model at a time.")
    max_queue: int = HfArg(default=32, help="Actions that may wait; further ones are told to come back.")
    max_loaded_models: int = HfArg(default=2, help="Models that stay in memory.")
    export_space: str | None = HfArg(default=None, help="Write the page as a Space into this folder, and end.")

    def __post_init__(self):
        super().__post_init__()
        if self.concurrency < 1:
            raise ValueError(f"`concurrency` must be positive, got {self.concurrency}.")
        if self.allow_other_models and self.is_shared:
            raise ValueError(
                "`allow_other_models` must be False on a page that others can reach: they could fill the disk."
            )

    @property
    def is_shared(self) -> bool:
        """Whether others than the user of this machine can reach the page."""
        host = self.host or os.environ.get("GRADIO_SERVER_NAME") or LOCAL_HOSTS[0]
        by_environment = os.environ.get("GRADIO_SHARE", "").lower() in ("true", "1")
        return self.share or by_environment or "SPACE_ID" in os.environ or host not in LOCAL_HOSTS


def main(args: AppArguments) -> None:
    if args.export_space is not None:
        export_space(args.export_space)
        print(f"Wrote the Space {args.export_space}: hf upload you/name {args.export_space} --type space")
        return
    device = args.device or torch.accelerator.current_accelerator() or "cpu"
    models = Models(
        args.models, args.allow_other_models, args.max_loaded_models, device=device, dtype=getattr(torch, args.dtype)
    )
    models.get(args.models[0])  # a wrong name ends the script here
    page = build_page(models, args, args.concurrency, args.max_queue)
    page.launch(share=args.share, server_name=args.host, server_port=args.port, **serving(args))


if __name__ == "__main__":
    run_script(main, AppArguments)
