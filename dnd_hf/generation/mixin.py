"""ImageGenerationMixin: adds `generate` and scoring to a model that predicts the residual codes of a grid."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from transformers import GenerationConfig

from ..ops.cpu_precision import warn_of_slow_precision
from ..ops.number_checks import whole_number
from ..ops.tensor_checks import check_integers
from .cuda_graphs import GraphedLoop, KeptLoops
from .decoders import plain_runner
from .evaluation_mode import evaluation_mode
from .given_codes import GivenCodes, checked_given_codes
from .guidance import guidance_scales
from .loop import SamplingLoop
from .noise import checked_generators, uniform_noise
from .outpainting import OutpaintingMixin
from .packed_decoder import can_run_packed, packed_runner
from .packing import PackingMixin
from .scoring import CodeDistributions, CodeScores, code_distributions, code_log_probs
from .settings import SamplingSettings
from .windows import (
    WindowRates,
    automatic_positions_per_pass,
    checked_positions_per_pass,
    several_cells_a_pass,
)


class ImageGenerationMixin(OutpaintingMixin, PackingMixin):
    """Adds `generate`, which replaces that of transformers (several codes a step), `inpaint`, `outpaint`, `score` and
    `code_distributions`.

    What a model must offer for them is [`ImageCodeModel`].
    """

    cuda_graphs: bool = False
    """Set it to True, and `generate` on a CUDA device replays its steps as CUDA graphs. They are captured in the first
    call with a new batch size (rounded up to a power of two), temperature or filter and kept, cache included."""

    cpu_kernels: bool = False
    """Set it to True, and packed layers on a CPU are C++: less time, the same codes in float32, other roundings in
    bfloat16. The machine's C++ compiler builds it in the first call, in about half a minute, and PyTorch keeps it for
    later processes. Without a compiler there is a warning, and all is as with False."""

    _kept_loops: KeptLoops | None = None
    _window_rates: dict[tuple[int, int], WindowRates] | None = None

    def generate(
        self,
        class_labels: Tensor | Sequence[int] | int,
        guidance_scale: float | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        do_sample: bool | None = None,
        generator: torch.Generator | int | Sequence[torch.Generator | int] | None = None,
        generation_config: GenerationConfig | None = None,
        callback: Callable[[int, Tensor], bool | None] | None = None,
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
        codes: Tensor | None = None,
        codes_mask: Tensor | None = None,
        positions_per_pass: int | str = "auto",
    ) -> Tensor:
        """Samples the codes of one image per label.

        Arguments left `None` are taken from `generation_config` (default: the checkpoint's own); what that leaves
        open is guidance 2 (1 without a null class), constant, temperature 1, no filters, sampling.

        Calls on one model may overlap (threads, a call inside a callback): each keeps its state to itself. A model in
        training mode is in evaluation mode until the last of them ends, also for a training step beside them. Inside
        `torch.autocast`, layers that run as they are follow it; packed and captured ones compute as their weights are.

        Args:
            class_labels: `(batch,)` integers in `[0, num_classes)`.
            guidance_scale: logits become `u + (c - u) * guidance_scale`, u those of the null class; 1: no guidance,
                with half as many sequences. At least 0.
            temperature: the logits are divided by it; greater than 0. One value, or one per depth; likewise
                `top_k` and `top_p`.
            top_k: only the k most likely codes may be drawn; 0: all.
            top_p: only the most likely codes that together reach this probability may be drawn; in (0, 1].
                The order is temperature, top-k, top-p.
            do_sample: `False`: the most likely code is taken (greedy).
            generator: one, or a list of one per image: then image i depends only on its own generator, not on the
                batch. An integer in `[0, 2**64)` is the seed of a new generator on the CPU.
            callback: called after each grid cell with its index and the codes so far. Where it returns True, sampling
                ends; the codes of the cells behind are 0 (given ones stay).
            guidance_schedule, guidance_power: how the guidance grows over the grid, see [`guidance_scales`];
                `"constant"` (the default), `"linear"` or `"power-cosine"`, the last with a power greater than 0
                (default 2.75).
            codes: `(batch, height, width, depth)`, codes that are given: they stay, and what comes after them (cells
                in raster order, and within a cell the higher depths) is sampled as if they had been drawn. Integers
                in `[0, vocab_size)` where the mask is True; elsewhere they are not read.
            codes_mask: the same shape, booleans: True where the given code stays, any positions and depths; False
                where a code is sampled, with the same random numbers as without given codes.
            positions_per_pass: how many positions of each image a pass computes, from guesses of the codes before each;
                those whose guesses were right are final, so the codes are those of 1, in fewer passes
                ([`several_cells_a_pass`]). The images of a batch advance at their own pace (with flash attention, which
                has no mask for that, together). Products of other shapes round in another way, as with another batch
                size: where a random number lies on the border between two codes, the other code may be drawn. In
                float32 that is rare (no code in 200 images of the bundled `words`), in half precision it is common.
                `"auto"` is 1 except for one or two images of a float32 model on a CPU; there it tries several where the
                time of passes says that they pay, and an image loses at most 3 % by that. On a GPU each pass of several
                waits for a small read of the device; with `cuda_graphs` the passes of a number are captured like those
                of 1.

        Returns:
            `(batch, height, width, depth)` int64 in `[0, vocab_size)`.

        Raises:
            ValueError: an argument out of its range; nothing has been computed then. Or, at the end of the loop: the
                logits were not finite numbers.
        """
        steps = self.generate_steps(
            class_labels,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            generation_config=generation_config,
            codes=codes,
            codes_mask=codes_mask,
            positions_per_pass=positions_per_pass,
        )
        with closing(steps):
            for cell, sampled in steps:
                if callback is not None and callback(cell, sampled) is True:
                    break
        return sampled.clone()

    @apply_forward_hook  # offloaded models come to the device for sampling as they do for `forward`
    def generate_steps(
        self,
        class_labels: Tensor | Sequence[int] | int,
        *,
        generator: torch.Generator | int | Sequence[torch.Generator | int] | None = None,
        generation_config: GenerationConfig | None = None,
        codes: Tensor | None = None,
        codes_mask: Tensor | None = None,
        positions_per_pass: int | str = "auto",
        **settings,
    ) -> Generator[tuple[int, Tensor], None, None]:
        """Samples as [`generate`] does, whose arguments and errors it has, and yields after each grid cell.

        The arguments are checked at once; nothing is computed before the first cell is asked for, and nothing more
        after the last one. A generator that is closed ends the sampling.

        Yields:
            The index of a cell in raster order, and the codes so far, `(batch, height, width, depth)`. They are the
            loop's own: to change or keep them, copy them.
        """
        config = self.config
        conditions_BT = self.check_conditions(class_labels)
        if generation_config is None:
            generation_config = self.generation_config
        if not isinstance(generation_config, GenerationConfig):
            raise ValueError(f"`generation_config` must be a GenerationConfig, got {generation_config!r}.")
        resolved = SamplingSettings.resolve(config, generation_config, **settings)
        batch, device = len(conditions_BT), conditions_BT.device
        shape = (batch, *config.grid_size, config.code_depth)
        given = checked_given_codes(codes, codes_mask, shape, config.vocab_size, device)
        generator = checked_generators(generator, batch)
        self._check_cuda_graphs(device)
        cells_a_pass = checked_positions_per_pass(positions_per_pass, config.sequence_length)
        return self._steps(resolved, conditions_BT, generator, given, cells_a_pass)

    @torch.no_grad()
    def _steps(
        self,
        settings: SamplingSettings,
        conditions_BT: Tensor,
        generator: torch.Generator | list | None,
        given: GivenCodes | None,
        cells_a_pass: int | str,
    ) -> Generator[tuple[int, Tensor], None, None]:
        config = self.config
        noise_BLD = None
        if settings.do_sample:
            shape = (len(conditions_BT), config.sequence_length, config.code_depth)
            noise_BLD = uniform_noise(shape, generator, conditions_BT.device)
        scales = guidance_scales(
            settings.guidance_scale, settings.guidance_schedule, settings.guidance_power, config.sequence_length
        )
        whole_L = given.whole_L if given is not None else (False,) * config.sequence_length
        (loop, cells), cell = self._sampling(settings, conditions_BT, whole_L, cells_a_pass), -1
        try:
            with evaluation_mode(self):
                loop.start(conditions_BT, noise_BLD, scales, given)
                for cell in cells:
                    yield cell, loop.codes_up_to(cell)
            loop.check_finite(cell)
        except GeneratorExit:
            loop.check_finite(cell)
            raise
        finally:
            loop.release()

    @torch.no_grad()
    @apply_forward_hook
    def score(
        self, class_labels: Tensor | Sequence[int] | int | None, codes: Tensor, batch_size: int = 64
    ) -> CodeScores:
        """The log-probability of codes under the model's own distribution (temperature 1, no filters, no guidance).

        The logits of a whole batch are never held ([`code_log_probs`]). A model in training mode is in evaluation mode
        for the time of the call.

        Args:
            class_labels: `(batch,)` integers in `[0, num_classes)`; None: the null class, that is without a condition.
            codes: `(batch, height, width, depth)` integers in `[0, vocab_size)`.
            batch_size: images that pass the layers at a time.

        Raises:
            ValueError: labels or codes of another shape or type, or out of their range; None for a model without a null
                class. Nothing has been computed then.
        """
        codes = self._check_codes(codes)
        conditions_BT = self._scored_conditions(class_labels, codes)
        batch_size = whole_number("batch_size", batch_size)
        warn_of_slow_precision(codes.device, self.dtype)
        parts = zip(conditions_BT.split(batch_size), codes.split(batch_size))
        with evaluation_mode(self):
            log_probs = torch.cat([code_log_probs(self, *part) for part in parts])
        return CodeScores(total=log_probs.sum((1, 2, 3)), log_probs=log_probs)

    @torch.no_grad()
    @apply_forward_hook
    def code_distributions(
        self, class_labels: Tensor | Sequence[int] | int | None, codes: Tensor, num_top_codes: int = 5
    ) -> CodeDistributions:
        """What the model expected at each code: entropies, the most likely codes, and the probability of the given one.

        The distributions are the model's own (temperature 1, no filters, no guidance), and all images pass the layers
        at once; the rest is as in [`score`].

        Args:
            class_labels, codes: as in [`score`].
            num_top_codes: how many of the most likely codes, in `[1, vocab_size]`.

        Raises:
            ValueError: an argument of another shape or type, or out of its range; nothing has been computed then.
        """
        codes = self._check_codes(codes)
        conditions_BT = self._scored_conditions(class_labels, codes)
        num_top_codes = whole_number("num_top_codes", num_top_codes, maximum=self.config.vocab_size)
        warn_of_slow_precision(codes.device, self.dtype)
        with evaluation_mode(self):
            return code_distributions(self, conditions_BT, codes, num_top_codes)

    def _sampling(
        self, settings: SamplingSettings, conditions_BT: Tensor, whole_L: Sequence[bool], cells_a_pass: int | str
    ) -> tuple[SamplingLoop, Iterator[int]]:
        """The loop of a call, and what goes through it and yields each cell when it is final."""
        if self.cuda_graphs:
            count = cells_a_pass if isinstance(cells_a_pass, int) else 1
            graphed = self._graphed_loop(settings, conditions_BT, count)
            return graphed, several_cells_a_pass(graphed, whole_L, count)
        batch, device, packed = len(conditions_BT), conditions_BT.device, can_run_packed(self)
        rows, rates = 2 * batch if settings.guided else batch, None
        if isinstance(cells_a_pass, str):
            cells_a_pass = automatic_positions_per_pass(rows, batch, len(whole_L), self.dtype, packed)
            if cells_a_pass > 1:
                self._window_rates = self._window_rates or {}
                rates = self._window_rates.setdefault((batch, rows), WindowRates())
        runner = packed_runner(self, rows, cells_a_pass) if packed else plain_runner(self, rows, device, cells_a_pass)
        loop = SamplingLoop(self, runner, batch, settings, device)
        return loop, several_cells_a_pass(loop, whole_L, cells_a_pass, rates)

    def _graphed_loop(self, settings: SamplingSettings, conditions_BT: Tensor, count: int) -> GraphedLoop:
        weights, kept = tuple(weight.data_ptr() for weight in self.parameters()), self._kept_loops
        if kept is None or kept.weights != weights:
            kept = self._kept_loops = KeptLoops(weights)
        batch = 2 ** (len(conditions_BT) - 1).bit_length()
        return kept.take(self, batch, conditions_BT.shape[1], settings, count)

    def _check_cuda_graphs(self, device: torch.device) -> None:
        attention = self.config._attn_implementation
        if self.cuda_graphs and (device.type != "cuda" or attention not in ("sdpa", "eager")):
            raise ValueError(
                '`cuda_graphs` must be False except on CUDA devices with "sdpa" or "eager" attention, got'
                f' {device.type} and "{attention}".'
            )

    def check_conditions(self, class_labels: Tensor | Sequence[int] | int) -> Tensor:
        """Class labels as `(batch, 1)` int64 on the device where the model runs.

        Raises:
            ValueError: they are no integers in `[0, num_classes)`.
        """
        labels = torch.as_tensor(class_labels)
        num_classes = self.config.num_classes
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim > 1 or not labels.numel():
            raise ValueError(f"`class_labels` must be a non-empty list of integers, got {class_labels!r}.")
        labels = labels.reshape(-1, 1).long()
        wrong = labels[(labels < 0) | (labels >= num_classes)].tolist()
        if wrong:
            raise ValueError(f"`class_labels` must lie in [0, {num_classes}), got {wrong}.")
        # Sequentially offloaded weights are on "meta" until a layer runs; the pipeline's labels are where it will run.
        return labels if self.device.type == "meta" else labels.to(self.device)

    def null_conditions(self, conditions_BT: Tensor) -> Tensor:
        """The null class in place of each label."""
        return torch.full_like(conditions_BT, self.config.num_classes)

    def _scored_conditions(self, class_labels: Tensor | Sequence[int] | int | None, codes: Tensor) -> Tensor:
        if class_labels is not None:
            conditions_BT = self.check_conditions(class_labels)
            if len(conditions_BT) != len(codes):
                raise ValueError(f"`class_labels` must be as many as `codes` ({len(codes)}), got {len(conditions_BT)}.")
            return conditions_BT
        if not self.config.has_null_class:
            raise ValueError("`class_labels` must be given: this model has no null class (`class_dropout_prob` 0).")
        length = getattr(self.config, "prompt_length", 0) or 1
        return self.null_conditions(torch.zeros(len(codes), length, dtype=torch.int64, device=codes.device))

    def _check_codes(self, codes: Tensor) -> Tensor:
        config = self.config
        codes = torch.as_tensor(codes)
        grid = (*config.grid_size, config.code_depth)
        if codes.ndim != 4 or tuple(codes.shape[1:]) != grid or not len(codes):
            raise ValueError(f"`codes` must be (batch, {', '.join(map(str, grid))}), got shape {tuple(codes.shape)}.")
        check_integers("codes", codes, config.vocab_size, wait=True)
        codes = codes.long()
        return codes if self.device.type == "meta" else codes.to(self.device)
