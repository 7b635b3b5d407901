"""score(): the log-probability of given codes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from transformers.utils import ModelOutput

from ..ops.linear_cross_entropy import LOGITS_AT_ONCE
from .evaluation_mode import evaluation_mode


@dataclass
class CodeScores(ModelOutput):
    """Output of [`ScoringMixin.score`].

    Args:
        total: `(batch,)` float32: the log-probability of all codes of an image, in nats.
        log_probs: `(batch, height, width, depth)` float32: that of each code, given the condition and all codes before
            it (cells in raster order, and within a cell the lower depths).
    """

    total: Tensor | None = None
    log_probs: Tensor | None = None


class ScoringMixin:
    """Adds `score` to an [`ImageCodeModel`]."""

    @torch.no_grad()
    @apply_forward_hook
    def score(
        self, class_labels: Tensor | Sequence[int] | int | None, codes: Tensor, batch_size: int = 64
    ) -> CodeScores:
        """The log-probability of codes under the model's own distribution (temperature 1, no filters, no guidance).

        At most `LOGITS_AT_ONCE` logits exist at a time. A model in training mode is in evaluation mode for the time of
        the call, as in `generate`.

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
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a whole number, at least 1, got {batch_size!r}.")
        parts = zip(conditions_BT.split(batch_size), codes.split(batch_size))
        with evaluation_mode(self):
            log_probs = torch.cat([self._log_probs(*part) for part in parts])
        return CodeScores(total=log_probs.sum((1, 2, 3)), log_probs=log_probs)

    def _log_probs(self, conditions_BT: Tensor, codes: Tensor) -> Tensor:
        """`(B, height, width, depth)` of a batch that passes the layers at once."""
        log_probs = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        size = max(1, LOGITS_AT_ONCE // self.config.vocab_size)

        def read(k: int, hidden_BLC: Tensor) -> None:
            head = self.heads[k if len(self.heads) > 1 else 0]
            pieces = zip(hidden_BLC.flatten(0, 1).split(size), codes[..., k].flatten().split(size))
            of_codes = [
                -torch.nn.functional.cross_entropy(head(rows).float(), goals, reduction="none")
                for rows, goals in pieces
            ]
            log_probs[..., k] = torch.cat(of_codes).view(codes.shape[:-1])

        self.read_by_heads(conditions_BT, codes, read)
        return log_probs

    def _scored_conditions(self, class_labels, codes: Tensor) -> Tensor:
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
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"`codes` must be integers, got {codes.dtype}.")
        codes = codes.long()
        if codes.min() < 0 or codes.max() >= config.vocab_size:
            raise ValueError(
                f"`codes` must lie in [0, {config.vocab_size}), got {codes.min().item()} to {codes.max().item()}."
            )
        return codes if self.device.type == "meta" else codes.to(self.device)
