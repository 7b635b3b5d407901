"""What changes the logits of a depth before a code is drawn: temperature, then top-k, then top-p."""

from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .settings import SamplingSettings


def logits_filters(settings: SamplingSettings) -> list[LogitsProcessorList]:
    """For each depth transformers' processors, called as `processors(None, logits_BV)`."""
    filters = []
    for temperature, top_k, top_p in zip(settings.temperature, settings.top_k, settings.top_p):
        processors = LogitsProcessorList()
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(temperature))
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        filters.append(processors)
    return filters
