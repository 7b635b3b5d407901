"""The log-probability of given codes: one teacher-forced pass, with few logits at a time."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from ..ops.linear_cross_entropy import LOGITS_AT_ONCE
from .decoders import head_of_each_depth
from .interface import ImageCodeModel


@dataclass
class CodeScores(ModelOutput):
    """Output of `score`.

    Args:
        total: `(batch,)` float32: the log-probability of all codes of an image, in nats.
        log_probs: `(batch, height, width, depth)` float32: that of each code, given the condition and all codes before
            it (cells in raster order, and within a cell the lower depths).
    """

    total: Tensor | None = None
    log_probs: Tensor | None = None


def code_log_probs(model: ImageCodeModel, conditions_BT: Tensor, codes: Tensor) -> Tensor:
    """The log-probability of each of the codes `(batch, height, width, depth)`, float32.

    Temperature 1, no filters, no guidance. At most `LOGITS_AT_ONCE` logits exist at a time.
    """
    log_probs = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    heads = head_of_each_depth(model.heads, model.config.code_depth)
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)

    def read(k: int, hidden_BLC: Tensor) -> None:
        pieces = zip(hidden_BLC.flatten(0, 1).split(size), codes[..., k].flatten().split(size))
        losses = [F.cross_entropy(heads[k](rows).float(), targets, reduction="none") for rows, targets in pieces]
        log_probs[..., k] = -torch.cat(losses).view(codes.shape[:-1])

    model.read_by_heads(conditions_BT, codes, read)
    return log_probs
