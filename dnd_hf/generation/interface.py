"""What sampling and scoring ask of a model, and what a model gets in return: the seam between models and generation.

Shape suffixes, here and in the other files of this folder: B batch, R rows (the images and, with guidance, one null
sequence for each), T tokens, L grid cells in raster order, D depth, C hidden size, V codebook size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


Layer = Callable[[Tensor], Tensor]
"""A transformer layer that needs nothing but the hidden states of the new tokens, `(R, T, C)`, to the same shape."""

ChooseCodes = Callable[[int, Tensor], Tensor]
"""`choose(k, hidden_RTC)` takes what head k reads, behind the norm, and returns the codes `(R, T)` of depth k. It may
get all cells of a pass, or only those whose codes are to be chosen."""


Position = int | list[int]
"""The position of the first of new tokens: one for all sequences, or one for each."""


@dataclass(frozen=True)
class LayerStack:
    """Transformer layers that a token passes one after the other, and what a key/value cache for them needs.

    Args:
        layers: modules, called as `layer(hidden_RTC, attention_mask=, past_key_values=)`, with `position_embeddings=`
            where there is `rotary`, which return the hidden states and call `past_key_values.update(key, value, i)`.
            On CPUs they are packed where they are pre-norm blocks made of `input_layernorm`, `self_attn` (`q_proj`,
            `k_proj`, `v_proj`, `o_proj`, `head_dim`, `scaling`), `post_attention_layernorm` and `mlp` (`gate_proj`,
            `up_proj`, `down_proj`, or only the last two; `act_fn`), with plain `nn.Linear` projections and
            `nn.RMSNorm` or `nn.LayerNorm`; other layers run as they are.
        length: the most tokens of a sequence.
        num_key_value_heads, head_dim: shape of the keys and values of a token.
        rotary: cosines and sines, each `(1, length, head_dim)` in transformers' half-split layout; None where the
            tokens carry their positions.
    """

    layers: Sequence[nn.Module]
    length: int
    num_key_value_heads: int
    head_dim: int
    rotary: tuple[Tensor, Tensor] | None = None


class Decoder(Protocol):
    """Runs one [`LayerStack`] for the next tokens of each sequence and keeps their keys and values."""

    def at(self, position: Position, count: int = 1) -> list[Layer]:
        """The layers, ready for the `count` tokens from `position` on, each of which sees those up to itself.

        The tokens of all positions before have been read; those of later ones are no longer seen. So back at 0 the
        decoder begins anew.
        """

    def reorder(self, rows: Tensor) -> None:
        """Row i takes over what was kept of row `rows[i]`. Where they are fewer than before, there are fewer rows from
        now on."""


class ImageCodeModel(Protocol):
    """A model that predicts the codes of a grid cell by cell, and those of a cell depth by depth.

    Besides these it is an `nn.Module` with `device` and `dtype`. Its `config` has `grid_size` (height, width),
    `sequence_length` (height * width), `code_depth`, `vocab_size`, `num_classes` and `has_null_class`.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype
    heads: nn.ModuleList
    """The linear layers that make logits, one for all depths or one for each."""

    training: bool
    cpu_kernels: bool
    """Whether packed layers use compiled kernels; the mixin's own says False."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As in `nn.Module`."""

    def check_conditions(self, class_labels) -> Tensor:
        """What the user gave as class labels, as `(B, T)` int64 on the model's device, T being 1 for labels, the length
        of the prompt for text. Raises a ValueError that names `class_labels` where they are wrong. The mixin's own
        takes class labels."""

    def null_conditions(self, conditions_BT: Tensor) -> Tensor:
        """What stands for no condition, of the same shape; the mixin's own is the class `num_classes`."""

    def layer_stacks(self, device: torch.device) -> list[LayerStack]:
        """The stacks that `decode` runs, for sampling on a device (`self.device`, but with offloaded weights). The
        first reads the condition tokens and the cells, so its length is at least `T + sequence_length - 1`; a second
        one may read the depths of a cell."""

    def condition_tokens(self, conditions_RT: Tensor) -> Tensor:
        """The tokens `(R, T, C)` before the grid; the last of them predicts the first cell."""

    def cell_tokens(self, codes_RLD: Tensor, cells: Tensor) -> Tensor:
        """The tokens `(R, L, C)` of cells with these codes, which predict those after. The cells are `(L,)`, or
        `(R, L)` where they are not the same in all sequences (int64, on the device)."""

    def decode(
        self, tokens_RTC: Tensor, choose: ChooseCodes, decoders: Sequence[Decoder], position: Position, count: int = 1
    ) -> None:
        """Runs the model for new tokens of each sequence and has the codes of the last `count` cells chosen.

        Calls `choose(k, hidden)` for k = 0, 1, ... in order; what it returns is read by the later depths.

        Args:
            tokens_RTC: tokens of which each predicts a cell; the first ones may be condition tokens that do not.
            decoders: one for each of `layer_stacks`. The first runs all tokens; a second one, `count` cells of each
                sequence as so many rows.
            position: of the first token in the first stack, from 0. It is only for `at` of the first decoder: where
                steps are replayed as CUDA graphs it is the position at which they were captured.
            count: how many tokens, the last ones, predict cells whose codes are not known.
        """

    def read_by_heads(self, conditions_BT: Tensor, codes: Tensor, read: Callable[[int, Tensor], None]) -> None:
        """Teacher forcing, for scoring: runs the model over whole grids and calls `read(k, hidden_BLC)` for each depth
        in order with what head k reads, behind the norm; position i predicts code k of cell i.

        Args:
            codes: `(B, height, width, depth)`, the true ones.
        """
