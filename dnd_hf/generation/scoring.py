"""What a model expects at each of given codes: one teacher-forced pass, with few logits at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from ..ops.linear_cross_entropy import LOGITS_AT_ONCE
from .decoders import head_of_each_depth
from .interface import ImageCodeModel
from .packed_decoder import packed_runner
from .packed_weights import released_layers


Head = Callable[[Tensor], Tensor]


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


@dataclass
class CodeDistributions(ModelOutput):
    """Output of `code_distributions`: what the model expected at each code, given all codes before it.

    Args:
        log_probs: `(batch, height, width, depth)` float32, in nats: of the given codes, as in [`CodeScores`].
        entropies: `(batch, height, width, depth)` float32, in nats: `-sum(p ln p)` over the codebook, in
            `[0, ln vocab_size]`.
        top_codes: `(batch, height, width, depth, num_top_codes)` int64: the most likely codes, the likeliest first.
        top_log_probs: the same shape, float32, in nats: theirs.
    """

    log_probs: Tensor | None = None
    entropies: Tensor | None = None
    top_codes: Tensor | None = None
    top_log_probs: Tensor | None = None


def code_log_probs(model: ImageCodeModel, conditions_BT: Tensor, codes: Tensor) -> Tensor:
    """The log-probability of each of the codes `(batch, height, width, depth)`, float32.

    Temperature 1, no filters, no guidance. At most `LOGITS_AT_ONCE` logits exist at a time.
    """
    log_probs = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)

    def read(k: int, head: Head, hidden_BLC: Tensor) -> None:
        pieces = zip(hidden_BLC.flatten(0, 1).split(size), codes[..., k].flatten().split(size))
        losses = [F.cross_entropy(head(rows).float(), targets, reduction="none") for rows, targets in pieces]
        log_probs[..., k] = -torch.cat(losses).view(codes.shape[:-1])

    read_by_heads(model, conditions_BT, codes, read)
    return log_probs


def code_distributions(
    model: ImageCodeModel, conditions_BT: Tensor, codes: Tensor, num_top_codes: int
) -> CodeDistributions:
    """The distribution from which each of the codes `(batch, height, width, depth)` would be drawn, in short.

    Temperature 1, no filters, no guidance. At most `LOGITS_AT_ONCE` logits exist at a time.
    """
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    depths: list[tuple[Tensor, ...]] = []

    def read(k: int, head: Head, hidden_BLC: Tensor) -> None:
        parts = []
        for rows, targets in zip(hidden_BLC.flatten(0, 1).split(size), codes[..., k].flatten().split(size)):
            log_probs = head(rows).float().log_softmax(-1)
            entropies = torch.special.entr(log_probs.exp()).sum(-1)
            top = log_probs.topk(num_top_codes)
            parts.append((log_probs.gather(-1, targets[:, None])[:, 0], entropies, top.indices, top.values))
        depths.append(tuple(map(torch.cat, zip(*parts))))

    read_by_heads(model, conditions_BT, codes, read)
    log_probs, entropies, top_codes, top_log_probs = (torch.stack(fields, dim=1) for fields in zip(*depths))
    shape = codes.shape
    return CodeDistributions(
        log_probs=log_probs.view(shape),
        entropies=entropies.view(shape),
        top_codes=top_codes.view(*shape, num_top_codes),
        top_log_probs=top_log_probs.view(*shape, num_top_codes),
    )


def read_by_heads(
    model: ImageCodeModel, conditions_BT: Tensor, codes: Tensor, read: Callable[[int, Head, Tensor], None]
) -> None:
    """Teacher forcing: calls `read(k, head, hidden_BLC)` for each depth, with its head and what that reads.

    Layers whose weights are only there packed, to decode, run all cells in one pass.
    """
    depth, length = model.config.code_depth, model.config.sequence_length
    if not released_layers(model):
        heads = head_of_each_depth(model.heads, depth)
        model.read_by_heads(conditions_BT, codes, lambda k, hidden_BLC: read(k, heads[k], hidden_BLC))
        return
    runner, codes_BLD = packed_runner(model, len(codes), length), codes.flatten(1, 2)
    cells_L = torch.arange(length - 1, device=codes.device)

    def teach(k: int, hidden_BLC: Tensor) -> Tensor:
        read(k, runner.heads[k], hidden_BLC)
        return codes_BLD[..., k]

    with runner.context():
        tokens = [model.condition_tokens(conditions_BT), model.cell_tokens(codes_BLD[:, :-1], cells_L)]
        model.decode(torch.cat(tokens, dim=1), teach, runner.decoders, 0, length)
