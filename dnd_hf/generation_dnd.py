"""generate(): the sampling loop of the DnD-Transformer, with cache, guidance and filters."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .decoding_dnd import Decoder, PackedDecoder


GUIDANCE_SCHEDULES = ("constant", "linear", "power-cosine")


def guidance_scales(scale: float, schedule: str, power: float, length: int) -> list[float]:
    """The guidance scale of each grid position t of `length`, in raster order.

    Args:
        scale: g, the scale that the schedule is about.
        schedule: `"constant"`: g. `"linear"`: `1 + (g - 1) * t / length`. `"power-cosine"` (RAR, arXiv 2411.00776,
            Appendix): `1 + (g - 1) / 2 * (1 - cos(pi * (t / length) ** power))`.
        power: of the last; RAR's are 1.2 to 2.75. The greater, the later guidance sets in.
        length: number of positions.
    """
    progress = [t / length for t in range(length)]
    if schedule == "linear":
        return [1 + (scale - 1) * part for part in progress]
    if schedule == "power-cosine":
        return [1 + (scale - 1) / 2 * (1 - math.cos(math.pi * part**power)) for part in progress]
    return [scale] * length


class DnDGenerationMixin(GenerationMixin):
    """Adds `generate`, which replaces that of transformers: several codes a step, from heads between layers."""

    _cache_storage: Tensor | None = None

    @torch.no_grad()
    @apply_forward_hook  # offloaded models come to the device for `generate` as they do for `forward`
    def generate(
        self,
        class_labels: Tensor | Sequence[int] | int,
        guidance_scale: float | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        do_sample: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        generation_config: GenerationConfig | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
    ) -> Tensor:
        """Samples the codes of one image a label.

        Arguments left `None` are taken from `generation_config` (default: the checkpoint's own); what that leaves
        open is guidance 2 (1 without a null class), constant, temperature 1, no filters, sampling.

        Args:
            class_labels: `(batch,)` integers in `[0, num_classes)`.
            guidance_scale: logits become `u + (c - u) * guidance_scale`, u those of the null class; 1: no guidance,
                at half the cost. At least 0.
            temperature: the logits are divided by it; greater than 0. One value, or one a depth, as the next two.
            top_k: only the k most likely codes may be drawn; 0: all.
            top_p: only the most likely codes that together reach this probability may be drawn; in (0, 1].
                The order is temperature, top-k, top-p.
            do_sample: `False`: the most likely code is taken (greedy).
            generator: one, or one an image: then image i depends on its own generator alone, not on the batch.
            callback: called after each grid position with its index and the codes so far.
            guidance_schedule, guidance_power: how the guidance grows over the picture, see [`guidance_scales`];
                `"constant"` (the default), `"linear"` or `"power-cosine"`, the last with a power greater than 0
                (default 2.75).

        Returns:
            `(batch, height, width, depth)` int64 in `[0, vocab_size)`.

        Raises:
            ValueError: an argument out of its range; nothing has been computed then.
        """
        config = self.config
        class_labels = self._check_labels(class_labels)
        batch, length, depth = len(class_labels), config.sequence_length, config.code_depth
        sampling = generation_config if generation_config is not None else self.generation_config
        if guidance_scale is None:
            guidance_scale = sampling.guidance_scale
        if guidance_scale is None:
            guidance_scale = 2.0 if config.has_null_class else 1.0
        _check_range("guidance_scale", guidance_scale, "finite and at least 0", lambda v: v >= 0)
        if guidance_schedule is None:
            guidance_schedule = getattr(sampling, "guidance_schedule", "constant")
        if guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(f"`guidance_schedule` must be one of {GUIDANCE_SCHEDULES}, got {guidance_schedule!r}.")
        if guidance_power is None:
            guidance_power = getattr(sampling, "guidance_power", 2.75)
        _check_range("guidance_power", guidance_power, "finite and greater than 0", lambda v: v > 0)
        guided = guidance_scale != 1
        if guided and not config.has_null_class:
            raise ValueError(
                "`guidance_scale` must be 1 for a model without a null class (`class_dropout_prob` 0), got"
                f" {guidance_scale}."
            )
        if do_sample is None:
            do_sample = sampling.do_sample is not False
        filters = _logits_filters(
            temperature if temperature is not None else sampling.temperature,
            top_k if top_k is not None else sampling.top_k,
            top_p if top_p is not None else sampling.top_p,
            depth,
        )
        if isinstance(generator, (list, tuple)) and len(generator) != batch:
            raise ValueError(f"`generator` must be one, or a list of one an image ({batch}), got {len(generator)}.")
        device = class_labels.device
        noise_BLD = _uniform((batch, length, depth), generator, device) if do_sample else None

        scales = guidance_scales(guidance_scale, guidance_schedule, guidance_power, length)
        codes_BLD = torch.zeros(batch, length, depth, dtype=torch.int64, device=device)
        if guided:
            class_labels = torch.cat([class_labels, torch.full_like(class_labels, config.num_classes)])
        token_BC = self.embed_classes(class_labels)
        if PackedDecoder.can_run(self):
            decoder = PackedDecoder(self, len(class_labels))
        else:
            decoder = Decoder(self, self._allocate_cache(len(class_labels), device, token_BC.dtype))

        def choose(position: int, k: int, hidden_BLC: Tensor) -> Tensor:
            logits_BV = decoder.head(k)(hidden_BLC[:, -1]).float()
            if guided:
                conditional, null = logits_BV.chunk(2)
                logits_BV = null + (conditional - null) * scales[position]
            if do_sample:
                codes_B = draw(filters[k](None, logits_BV), noise_BLD[:, position, k])
            else:
                codes_B = logits_BV.argmax(-1)
            codes_BLD[:, position, k] = codes_B
            return (codes_B.repeat(2) if guided else codes_B)[:, None]

        was_training = self.training
        self.eval()
        try:
            for position in range(length):
                chosen = partial(choose, position)
                self.run_layers(token_BC[:, None], chosen, decoder.layers, **decoder.at(position))
                token_BC = self.embed_tokens(codes_BLD[:, position]).sum(1)
                token_BC = token_BC.repeat(2, 1) if guided else token_BC
                if callback is not None:
                    callback(position, codes_BLD.view(batch, *config.grid_size, depth))
        finally:
            self.train(was_training)
        return codes_BLD.view(batch, *config.grid_size, depth)

    def _check_labels(self, class_labels: Tensor | Sequence[int] | int) -> Tensor:
        labels = torch.as_tensor(class_labels)
        num_classes = self.config.num_classes
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim > 1 or not labels.numel():
            raise ValueError(f"`class_labels` must be a non-empty list of integers, got {class_labels!r}.")
        labels = labels.reshape(-1).long()
        wrong = labels[(labels < 0) | (labels >= num_classes)].tolist()
        if wrong:
            raise ValueError(f"`class_labels` must lie in [0, {num_classes}), got {wrong}.")
        # Sequentially offloaded weights are on "meta" until a layer runs; the pipeline's labels are where it will run.
        return labels if self.device.type == "meta" else labels.to(self.device)

    def _allocate_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        config = self.config
        shape = (
            config.prediction_layers[-1] + 1,
            2,
            batch,
            config.num_key_value_heads,
            config.sequence_length,
            config.head_dim,
        )
        storage = self._cache_storage
        fits = storage is not None and storage.dtype == dtype and storage.device == device
        if not fits or storage.shape[2] < batch:
            storage = self._cache_storage = torch.empty(shape, dtype=dtype, device=device)
        return storage[:, :, :batch]


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Samples from softmax(logits) by inverting the cumulative distribution.

    Args:
        logits: `(batch, vocab_size)`; -inf is never drawn.
        uniform: `(batch,)` float64 in [0, 1), the only randomness.

    Returns:
        `(batch,)` int64: the first code whose cumulative probability exceeds `uniform`.
    """
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _uniform(
    shape: tuple[int, ...], generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device
) -> Tensor:
    if isinstance(generator, (list, tuple)):
        return torch.cat([_uniform((1, *shape[1:]), one, device) for one in generator])
    source = generator.device if generator is not None else device
    if source.type == "mps":  # no float64 there
        source = torch.device("cpu")
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=source).to(device)


def _logits_filters(temperature, top_k, top_p, depth: int) -> list[LogitsProcessorList]:
    temperatures = _per_depth("temperature", temperature, 1.0, depth, "finite and greater than 0", lambda v: v > 0)
    top_ks = _per_depth("top_k", top_k, 0, depth, "a whole number, at least 0", lambda v: v >= 0 and v == int(v))
    top_ps = _per_depth("top_p", top_p, 1.0, depth, "within (0, 1]", lambda v: 0 < v <= 1)
    filters = []
    for temperature, top_k, top_p in zip(temperatures, top_ks, top_ps):
        processors = LogitsProcessorList()
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            processors.append(TopKLogitsWarper(int(top_k)))
        if top_p < 1:
            processors.append(TopPLogitsWarper(float(top_p)))
        filters.append(processors)
    return filters


def _per_depth(name: str, value, default, depth: int, allowed: str, check: Callable[[float], bool]) -> list:
    if value is None:
        value = default
    values = list(value) if isinstance(value, (list, tuple)) else [value] * depth
    if len(values) != depth:
        raise ValueError(f"`{name}` must be one value or one a depth ({depth}), got {len(values)}: {values}.")
    for one in values:
        _check_range(name, one, allowed, check)
    return values


def _check_range(name: str, value, allowed: str, check: Callable[[float], bool]) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not check(value):
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
