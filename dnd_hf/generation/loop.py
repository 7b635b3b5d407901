"""The sampling loop: from one grid cell to the next."""

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

    The token before the grid predicts cell 0, and the token of a cell the one after it. The cells of a pass are read
    on the device, so no pass waits for it.

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
        self.cell = torch.zeros(1, dtype=torch.int64, device=device)
        self.cells_T = self.cell
        """The cells that the tokens of a pass predict."""
        self.count = 1
        """How many of them, the last ones, are sampled."""
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
        first, end = self.unread, cell + count
        one = end - first == 1
        cells_T = self.cell.fill_(cell) if one else torch.arange(first, end, device=self.cell.device)
        with self.runner.context():
            self.run(cells_T, first, count)
        self.unread = end

    def run(self, cells_T: Tensor, first: int, count: int) -> None:
        """A pass of the tokens that predict consecutive cells; the codes of the last `count` of them are sampled.

        Args:
            cells_T: int64, on the device.
            first: the first of them. Where steps are replayed it is that of the captured one.
        """
        self.cells_T, self.count = cells_T, count
        tokens_RTC = self.tokens_before(cells_T) if first else self.first_tokens(cells_T)
        self.model.decode(tokens_RTC, self.choose, self.runner.decoders, self.position(first), count)

    def position(self, cell: int) -> int:
        """The position of the token with which a pass begins that predicts a cell and those after it."""
        return cell + self.conditions_RT.shape[1] - 1 if cell else 0

    def first_tokens(self, cells_T: Tensor) -> Tensor:
        """The tokens of the condition, and those that predict the cells after cell 0."""
        tokens_RTC = self.model.condition_tokens(self.conditions_RT)
        return torch.cat([tokens_RTC, self.tokens_before(cells_T[1:])], dim=1) if len(cells_T) > 1 else tokens_RTC

    def tokens_before(self, cells_T: Tensor) -> Tensor:
        """The tokens of the cells before these."""
        before_T = cells_T - 1
        tokens_BTC = self.model.cell_tokens(self.codes_BLD[:, before_T], before_T)
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
        right_N = (window_BND == guesses_BND).all(2).all(0)
        final = 1 + int(right_N[:-1].long().cumprod(0).sum())
        self.unread, self.guessed = cell + final, True
        return final

    def codes_up_to(self, cell: int) -> Tensor:
        """`(images, height, width, depth)`: the codes of cells up to this one; behind it the given ones, or zeros."""
        codes_BLD = self.codes_BLD[: self.images]
        if self.guessed:
            free_BLD = (torch.arange(codes_BLD.shape[1], device=codes_BLD.device) > cell)[:, None]
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

    def read_logits(self, k: int, cells: Tensor, logits_XV: Tensor) -> None:
        """Called with the logits of depth k of cells, images x cells, before codes are chosen."""

    def choose(self, k: int, hidden_RTC: Tensor) -> Tensor:
        """The codes `(rows, T)` of depth k of the last T cells of the pass, from what head k reads.

        Those of the last `count` cells are sampled here; both sequences of an image get the same.
        """
        cells, tokens = self.cells_T[-self.count :], hidden_RTC.shape[1]
        logits_XV = self.runner.heads[k](hidden_RTC[:, -self.count :]).flatten(0, 1).float()  # X: images x cells
        if self.guided:
            logits_XV = guide(logits_XV, self.scales_L[cells].repeat(len(self.codes_BLD))[:, None])
        self.read_logits(k, cells, logits_XV)
        if self.filters is None:
            codes_X, finite_X = logits_XV.argmax(-1), logits_XV.amax(-1).isfinite()
        else:
            codes_X = draw(self.filters[k](None, logits_XV), self.noise_BLD[:, cells, k].flatten())
            finite_X = codes_X < logits_XV.shape[-1]
            codes_X = codes_X.clamp_(max=logits_XV.shape[-1] - 1)
        codes_BT = codes_X.view(-1, self.count)
        if self.kept_BLD is not None:
            codes_BT = torch.where(self.kept_BLD[:, cells, k], self.codes_BLD[:, cells, k], codes_BT)
        self.finite_BLD[:, cells, k] = finite_X.view(-1, self.count)
        self.codes_BLD[:, cells, k] = codes_BT
        if tokens > self.count:
            codes_BT = self.codes_BLD[:, self.cells_T[-tokens:], k]
        return codes_BT.repeat(2, 1) if self.guided else codes_BT


def _padded(values_BLD: Tensor, missing: int) -> Tensor:
    """With so many more images, of zeros."""
    return F.pad(values_BLD, (0, 0, 0, 0, 0, missing))
