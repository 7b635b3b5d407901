"""generate(): the sampling loop of the DnD-Transformer, with guidance and filters."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .decoders import Decoder, PackedDecoder, StaticDecoder


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


class Sampler:
    """The sampling of a batch of images: what it keeps between grid positions, and the step from one to the next.

    The position is read on the device, so no step waits for it.

    Args:
        model: a [`DnDForImageGeneration`].
        batch: images.
        guided: whether each has a second sequence, of the null class.
        filters: what changes the logits of each depth before a code is drawn; None: the most likely code is taken.
        device: of the codes.
    """

    def __init__(
        self, model, batch: int, guided: bool, filters: list[LogitsProcessorList] | None, device: torch.device
    ):
        config = model.config
        self.model, self.guided, self.filters, self.rows = model, guided, filters, 2 * batch if guided else batch
        self.codes_BLD = torch.empty(batch, config.sequence_length, config.code_depth, dtype=torch.int64, device=device)
        self.noise_BLD = torch.empty(self.codes_BLD.shape, dtype=torch.float64, device=device) if filters else None
        self.scales_L = torch.empty(config.sequence_length, device=device)
        self.position = torch.empty(1, dtype=torch.int64, device=device)
        self.token_BC = None
        self.decoder = self.make_decoder()

    def make_decoder(self) -> Decoder | PackedDecoder | StaticDecoder:
        if PackedDecoder.can_run(self.model):
            return PackedDecoder(self.model, self.rows)
        return Decoder(self.model, self.model._allocate_cache(self.rows, self.position.device))

    def start(self, class_labels: Tensor, noise_BLD: Tensor | None, scales: list[float]) -> None:
        """Goes to position 0.

        Args:
            class_labels: `(images,)`, at most as many as there is room for; what is over samples the first class.
            noise_BLD: `(images, length, depth)` uniform float64 in [0, 1); None with `filters` None.
            scales: the guidance scale of each position.
        """
        missing = len(self.codes_BLD) - len(class_labels)
        class_labels = F.pad(class_labels, (0, missing))
        if self.guided:
            class_labels = torch.cat([class_labels, torch.full_like(class_labels, self.model.config.num_classes)])
        token_BC = self.model.embed_classes(class_labels)
        self.token_BC = token_BC if self.token_BC is None else self.token_BC.copy_(token_BC)
        if noise_BLD is not None:
            self.noise_BLD.copy_(F.pad(noise_BLD, (0, 0, 0, 0, 0, missing)))
        self.scales_L.copy_(torch.tensor(scales))
        self.codes_BLD.zero_()
        self.position.zero_()

    def step(self, position: int) -> None:
        """Samples the codes of a position; positions come in order, from 0."""
        model, decoder = self.model, self.decoder
        with decoder.context():
            model.run_layers(self.token_BC[:, None], self.choose, decoder.layers, **decoder.at(position))
            token_BC = model.embed_tokens(self.codes_BLD[:, self.position].squeeze(1)).sum(1)
            self.token_BC.copy_(token_BC.repeat(2, 1) if self.guided else token_BC)
            self.position += 1

    def choose(self, k: int, hidden_BLC: Tensor) -> Tensor:
        """The codes `(rows, 1)` of depth k."""
        logits_BV = self.decoder.head(k)(hidden_BLC[:, -1]).float()
        if self.guided:
            conditional, null = logits_BV.chunk(2)
            logits_BV = torch.addcmul(null, conditional - null, self.scales_L[self.position])
        if self.filters:
            codes_B = draw(self.filters[k](None, logits_BV), self.noise_BLD[:, self.position, k].squeeze(1))
        else:
            codes_B = logits_BV.argmax(-1)
        self.codes_BLD[:, self.position, k] = codes_B[:, None]
        return (codes_B.repeat(2) if self.guided else codes_B)[:, None]


class GraphSampler(Sampler):
    """A sampler whose steps are CUDA graphs: captured once, then each replayed by a single call.

    The first position that reads a new part of the cache runs as it is, and is captured after that.
    """

    def make_decoder(self) -> StaticDecoder:
        self.graphs = {}
        return StaticDecoder(self.model, self.rows, self.position)

    def step(self, position: int) -> None:
        read = self.decoder.read(position)
        if read in self.graphs:
            self.graphs[read].replay()
        else:
            super().step(position)
            self.graphs[read] = capture(partial(super().step, position), self.graphs.values())


def capture(function: Callable[[], None], others: Iterable[torch.cuda.CUDAGraph]) -> torch.cuda.CUDAGraph:
    """A graph of what `function` does, which is not run here, in the memory of others, never replayed at a time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=next((other.pool() for other in others), None)):
        function()
    return graph


class GraphSamplers(dict):
    """The graph samplers of a model by their settings; copies of the model begin without any."""

    def __reduce__(self):
        return GraphSamplers, ()


class DnDGenerationMixin(GenerationMixin):
    """Adds `generate`, which replaces that of transformers: several codes a step, from heads between layers."""

    cuda_graphs: bool = False
    """Set it to True, and `generate` on a CUDA device replays its steps as CUDA graphs. They are captured in the first
    call with a new batch size (rounded up to a power of two), temperature or filter and kept, cache included."""

    _cache_storage: Tensor | None = None
    _graph_samplers: GraphSamplers | None = None

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
                with half as many sequences. At least 0.
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
        if self.cuda_graphs and (device.type != "cuda" or config._attn_implementation not in ("sdpa", "eager")):
            raise ValueError(
                '`cuda_graphs` must be False except on CUDA devices with "sdpa" or "eager" attention, got'
                f' {device.type} and "{config._attn_implementation}".'
            )
        noise_BLD = _uniform((batch, length, depth), generator, device) if do_sample else None
        scales = guidance_scales(guidance_scale, guidance_schedule, guidance_power, length)
        was_training = self.training
        self.eval()
        try:
            sampler = self._make_sampler(batch, guided, filters if do_sample else None, device)
            sampler.start(class_labels, noise_BLD, scales)
            codes = sampler.codes_BLD[:batch].unflatten(1, config.grid_size)
            for position in range(length):
                sampler.step(position)
                if callback is not None:
                    callback(position, codes)
        finally:
            self.train(was_training)
        return codes.clone() if self.cuda_graphs else codes

    def _make_sampler(
        self, batch: int, guided: bool, filters: list[LogitsProcessorList] | None, device: torch.device
    ) -> Sampler:
        if not self.cuda_graphs:
            return Sampler(self, batch, guided, filters, device)
        weights = tuple(weight.data_ptr() for weight in self.parameters())
        if self._graph_samplers is None or self._graph_samplers.weights != weights:
            self._graph_samplers = GraphSamplers()
            self._graph_samplers.weights = weights
        batch = 2 ** (batch - 1).bit_length()
        settings = [[(type(one).__name__, *vars(one).values()) for one in processors] for processors in filters or []]
        key = (batch, guided, filters is None, str(settings), self.config._attn_implementation)
        if key not in self._graph_samplers:
            self._graph_samplers[key] = GraphSampler(self, batch, guided, filters, device)
        return self._graph_samplers[key]

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

    def cache_shape(self, batch: int) -> tuple[int, ...]:
        """`(layers, 2, batch, heads, positions, head_dim)`: keys and values of the layers that are run."""
        config = self.config
        layers = config.prediction_layers[-1] + 1
        return layers, 2, batch, config.num_key_value_heads, config.sequence_length, config.head_dim

    def _allocate_cache(self, batch: int, device: torch.device) -> Tensor:
        storage = self._cache_storage
        fits = storage is not None and storage.dtype == self.dtype and storage.device == device
        if not fits or storage.shape[2] < batch:
            shape = self.cache_shape(batch)
            storage = self._cache_storage = torch.empty(shape, dtype=self.dtype, device=device)
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
