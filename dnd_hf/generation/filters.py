"""What changes the logits of a depth before a code is drawn: temperature, then top-k, then top-p."""

from torch import Tensor
from transformers.generation import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .settings import SamplingSettings


def logits_filters(settings: SamplingSettings) -> list[list[LogitsProcessor]]:
    """Transformers' processors for each depth, see [`filtered`]."""
    filters = []
    for temperature, top_k, top_p in zip(settings.temperature, settings.top_k, settings.top_p):
        processors: list[LogitsProcessor] = []
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(temperature))
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        filters.append(processors)
    return filters


def filtered(processors: list[LogitsProcessor], logits_BV: Tensor) -> Tensor:
    """The logits after one processor and then the next. Transformers' own list inspects their signatures each time."""
    for processor in processors:
        logits_BV = processor(None, logits_BV)
    return logits_BV
