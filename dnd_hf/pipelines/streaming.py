"""An image while it is made: row by row, or depth by depth."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from .callbacks import CALLBACK_TENSORS, StepCallback, call_after_step, checked_tensor_inputs
from .conditions import read_conditions


ORDERS = ("rows", "depth")


class StreamingMixin(DiffusionPipeline):
    """Adds `stream` to a pipeline of a `transformer` and a `vqvae`."""

    def stream(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        by: str = "rows",
        generator: torch.Generator | int | Sequence[torch.Generator | int] | None = None,
        prompt: str | Sequence[str] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
        **settings,
    ) -> Iterator[Image.Image]:
        """Makes one image and yields it while it comes; the last frame is the image that a call makes.

        Nothing is computed before the first frame is asked for; a generator that is closed ends the sampling.

        With `by="rows"` there is a frame for each row of the grid, as soon as its codes are there; what is to come is
        grey. The decoder's group norms (and its attention) read the whole grid, so a strip by itself cannot be decoded
        exactly: a frame decodes all rows so far and the last of them once more, in place of the next one. Earlier rows
        still change a little from frame to frame.

        With `by="depth"` there is a frame for each depth: the first codes of all positions, then two, and so on. The
        model samples all depths of a position at once, so these frames come when all codes are there.

        Args:
            class_labels, generator, prompt: as in a call, of one image.
            by: `"rows"` or `"depth"`.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in a call; the last frame of an interrupted
                sampling is the image of the codes so far.
            settings: of the sampling, as in a call (`guidance_scale`, `temperature` ...).

        Yields:
            PIL images of the whole size.

        Raises:
            ValueError: an argument out of its range, when `stream` is called.
        """
        if by not in ORDERS:
            raise ValueError(f"`by` must be one of {ORDERS}, got {by!r}.")
        if self.vqvae is None:
            raise ValueError("`stream` needs a pipeline with a `vqvae`.")
        tensor_inputs = checked_tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        conditions = read_conditions(self.transformer, self.tokenizer, class_labels, prompt)
        conditions = conditions.to(self._execution_device)
        if len(conditions) != 1:
            raise ValueError(f"`class_labels` must be one label: `stream` makes one image, got {len(conditions)}.")
        steps = self.transformer.generate_steps(conditions, generator=generator, **settings)
        self._interrupt = False
        return self._frames(steps, by, partial(call_after_step, callback_on_step_end, tensor_inputs, self))

    @torch.no_grad()
    def _frames(
        self, steps: Iterator[tuple[int, Tensor]], by: str, after_step: Callable[[int, Tensor], bool]
    ) -> Iterator[Image.Image]:
        height, width = self.transformer.config.grid_size
        codes = torch.empty(0)
        offloading = getattr(self.transformer, "_hf_hook", None)
        try:
            with self.progress_bar(total=height * width) as progress:
                for cell, codes in steps:
                    ended = after_step(cell, codes)
                    progress.update()
                    if ended:
                        break
                    row, column = divmod(cell + 1, width)
                    if by == "rows" and column == 0 and row < height:
                        yield self._rows_so_far(codes[:, :row])
                        if offloading is not None:  # the decoder took the transformer's place on the device
                            offloading.pre_forward(self.transformer)
            depths = range(1, codes.shape[-1] + 1) if by == "depth" else [codes.shape[-1]]
            for depth in depths:
                sample = self.vqvae.decode_codes(codes, depth=depth).sample
                yield self.image_processor.postprocess(sample, output_type="pil")[0]
        finally:
            self.maybe_free_model_hooks()

    def _rows_so_far(self, codes: Tensor) -> Image.Image:
        """The image of the first rows of the grid `(1, rows, width, depth)`, grey below."""
        height, width = self._image_size
        sample = self.vqvae.decode_codes(torch.cat([codes, codes[:, -1:]], dim=1)).sample
        known = codes.shape[1] * self.vqvae.code_stride[0]
        frame = sample.new_zeros(1, sample.shape[1], height, width)
        frame[:, :, :known] = sample[:, :, :known]
        return self.image_processor.postprocess(frame, output_type="pil")[0]
