"""The sampling loop: from one grid cell to the next."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoders import ModelRunner
from .filters import logits_filters
from .given_codes import GivenCodes
from .guidance import guide
from .interface import ImageCodeModel
from .noise import draw
from .settings import SamplingSettings


class SamplingLoop:
    """The sampling of a batch of images: what a call keeps between passes, and a pass through the model.

    The token before the grid predicts cell 0, and the token of a cell the one after it. The cells of a pass are a slice
    of the grid; where a pass is replayed, one cell that is read on the device.

    Args:
        batch: images; with guidance each has a second sequence, of the null condition.
        device: of the codes.
    """

    def __init__(
        self,
        model: ImageCodeModel,
        runner: ModelRunner,
        batch: int,
        settings: SamplingSettings,
        device: torch.device,
    ):
        config = model.config
        self.model, self.runner, self.guided = model, runner, settings.guided
        self.filters = logits_filters(settings) if settings.do_sample else None
        self.images = batch
        self.codes_BLD = torch.zeros(batch, config.sequence_length, config.code_depth, dtype=torch.int64, device=device)
        self.noise_BLD = torch.zeros(self.codes_BLD.shape, dtype=torch.float64, device=device)
        self.scales_L = torch.ones(config.sequence_length, dtype=torch.float32, device=device)
        self.kept_BLD: Tensor | None = None
        """Which codes are given and stay; None: none."""
        self.finite_BLD = torch.ones(self.codes_BLD.shape, dtype=torch.bool, device=device)
        """Whether all logits of a code were finite. Codes that are drawn from others mean nothing."""
        self.grid_L = torch.arange(config.sequence_length, device=device)
        self.cells: slice | Tensor = slice(0, 0)
        """The cells that a pass samples, the last of those that its tokens predict."""
        self.cell_scales: Tensor | None = None
        """`(images x cells, 1)`: the guidance scale of each of them; None: no guidance."""
        self.unread = 0
        """The first cell before which the token has not been read, or with codes that were not final."""
        self.guessed = False
        """Whether codes behind those that are final may be guesses."""

    def start(
        self, conditions_BT: Tensor, noise_BLD: Tensor | None, scales: list[float], given: GivenCodes | None = None
    ) -> None:
        """Takes what decides the codes, and begins anew.

        Args:
            conditions_BT: at most as many as there is room for; what is over samples condition 0.
            noise_BLD: uniform float64 in [0, 1); None where no code is sampled.
            scales: the guidance scale of each cell.
            given: codes that stay.
        """
        self.images, self.unread, self.guessed = len(conditions_BT), 0, False
        missing = len(self.codes_BLD) - self.images
        conditions_BT = F.pad(conditions_BT, (0, 0, 0, missing))
        if self.guided:
            conditions_BT = torch.cat([conditions_BT, self.model.null_conditions(conditions_BT)])
        self.conditions_RT = conditions_BT
        if noise_BLD is not None:
            self.noise_BLD.copy_(_padded(noise_BLD, missing))
        self.scales_L.copy_(torch.tensor(scales, dtype=torch.float32))
        self.codes_BLD.zero_()
        self.finite_BLD.fill_(True)
        if given is not None:
            self.codes_BLD.copy_(_padded(given.codes_BLD, missing))
        self.keep(None if given is None else _padded(given.mask_BLD, missing))

    def keep(self, kept_BLD: Tensor | None) -> None:
        """Takes which codes stay."""
        self.kept_BLD = kept_BLD

    def step(self, cell: int, count: int = 1) -> None:
        """Samples the codes of `count` cells in one pass. Cells come in order; those left out have given codes."""
        first, self.unread = self.unread, cell + count
        with self.runner.context():
            self.run(first, cell, cell + count)

    def run(self, first: int, cell: int, end: int) -> None:
        """A pass of the tokens that predict the cells from `first` up to `end`, of which those from `cell` on are
        sampled."""
        self.sample(slice(first, end), slice(cell, end), first)

    def sample(self, predicted: slice | Tensor, cells: slice | Tensor, first: int) -> None:
        """The same. Where the one cell is read on the device, only what part of the cache is read follows `first`."""
        scales_T = self.scales_L[cells]
        self.cells, self.cell_scales = cells, scales_T.repeat(len(self.codes_BLD))[:, None] if self.guided else None
        tokens_RTC = self.tokens_before(predicted) if first else self.first_tokens(cast(slice, predicted))
        self.model.decode(tokens_RTC, self.choose, self.runner.decoders, self.position(first), len(scales_T))

    def position(self, cell: int) -> int:
        """The position of the token with which a pass begins that predicts a cell and those after it."""
        return cell + self.conditions_RT.shape[1] - 1 if cell else 0

    def first_tokens(self, cells: slice) -> Tensor:
        """The tokens of the condition, and those that predict the cells after cell 0."""
        tokens_RTC = self.model.condition_tokens(self.conditions_RT)
        if cells.stop == 1:
            return tokens_RTC
        return torch.cat([tokens_RTC, self.tokens_before(slice(1, cells.stop))], dim=1)

    def tokens_before(self, cells: slice | Tensor) -> Tensor:
        """The tokens of the cells before these."""
        before = slice(cells.start - 1, cells.stop - 1) if isinstance(cells, slice) else cells - 1
        tokens_BTC = self.model.cell_tokens(self.codes_BLD[:, before], self.grid_L[before])
        return tokens_BTC.repeat(2, 1, 1) if self.guided else tokens_BTC

    def step_window(self, cell: int, count: int) -> int:
        """Samples `count` cells of which the first codes so far are guesses; returns how many of them are final.

        A cell is final where the guesses of all cells before it were right, in all images.
        """
        if count == 1:
            self.step(cell)
            return 1
        window_BND = self.codes_BLD[: self.images, cell : cell + count]
        guesses_BND = window_BND.clone()
        self.step(cell, count)
        wrong_N = (window_BND != guesses_BND).any(2).any(0).tolist()
        final = next((n for n, wrong in enumerate(wrong_N, 1) if wrong), count)
        self.unread, self.guessed = cell + final, True
        return final

    def codes_up_to(self, cell: int) -> Tensor:
        """`(images, height, width, depth)`: the codes of cells up to this one; behind it the given ones, or zeros."""
        codes_BLD = self.codes_BLD[: self.images]
        if self.guessed:
            free_BLD = (self.grid_L > cell)[:, None]
            if self.kept_BLD is not None:
                free_BLD = free_BLD & ~self.kept_BLD[: self.images]
            codes_BLD = codes_BLD.masked_fill(free_BLD, 0)
        return codes_BLD.unflatten(1, tuple(self.model.config.grid_size))

    def check_finite(self, cell: int) -> None:
        """Raises ValueError where codes up to those of a cell were drawn from logits that are not finite."""
        if not self.finite_BLD[: self.images, : cell + 1].all():
            raise ValueError(
                "the logits are not finite numbers (NaN or infinite): the weights are broken or overflow in"
                f" {self.model.dtype}, or `temperature` is too small or `guidance_scale` too large."
            )

    def release(self) -> None:
        """Ends the call, however it went."""

    def read_logits(self, k: int, logits_XV: Tensor) -> None:
        """Called with the logits of depth k of `cells`, images x cells, before codes are chosen."""

    def choose(self, k: int, hidden_RTC: Tensor) -> Tensor:
        """The codes `(rows, T)` of depth k of the last T cells of the pass, from what head k reads.

        Those of `cells`, the last ones, are sampled here; both sequences of an image get the same.
        """
        cells, tokens = self.cells, hidden_RTC.shape[1]
        noise_BT = self.noise_BLD[:, cells, k]
        count = noise_BT.shape[1]
        logits_XV = self.runner.heads[k](hidden_RTC[:, -count:]).flatten(0, 1).float()  # X: images x cells
        if self.cell_scales is not None:
            logits_XV = guide(logits_XV, self.cell_scales)
        self.read_logits(k, logits_XV)
        if self.filters is None:
            codes_X, finite_X = logits_XV.argmax(-1), logits_XV.amax(-1).isfinite()
        else:
            codes_X = draw(self.filters[k](None, logits_XV), noise_BT.flatten())
            finite_X = codes_X < logits_XV.shape[-1]
            codes_X = codes_X.clamp_(max=logits_XV.shape[-1] - 1)
        codes_BT = codes_X.view(-1, count)
        if self.kept_BLD is not None:
            codes_BT = torch.where(self.kept_BLD[:, cells, k], self.codes_BLD[:, cells, k], codes_BT)
        self.finite_BLD[:, cells, k] = finite_X.view(-1, count)
        self.codes_BLD[:, cells, k] = codes_BT
        if isinstance(cells, slice) and tokens > count:
            codes_BT = self.codes_BLD[:, cells.stop - tokens : cells.stop, k]
        return codes_BT.repeat(2, 1) if self.guided else codes_BT


def _padded(values_BLD: Tensor, missing: int) -> Tensor:
    """With so many more images, of zeros."""
    return F.pad(values_BLD, (0, 0, 0, 0, 0, missing))
