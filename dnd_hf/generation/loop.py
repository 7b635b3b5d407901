"""The sampling loop: from one grid cell to the next."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoders import ModelRunner, one_a_row
from .filters import filtered, logits_filters
from .given_codes import GivenCodes
from .guidance import guide
from .interface import ImageCodeModel, Position
from .noise import draw
from .settings import SamplingSettings


class SamplingLoop:
    """The sampling of a batch of images: what a call keeps between passes, and a pass through the model.

    The token before the grid predicts cell 0, and the token of a cell the one after it. The cells of a pass are a slice
    of the grid, or a tensor of cells where they are not the same in all images.

    Args:
        batch: images; with guidance each has a second sequence, of the null condition.
        device: of the codes.
    """

    fixed_shapes = False
    """Whether passes of the same number of cells of all images are faster than shorter ones of fewer."""

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
        self.kept_BND: Tensor | None = None
        """The same of the cells that a pass samples, final ones included."""
        self.finite_BLD = torch.ones(self.codes_BLD.shape, dtype=torch.bool, device=device)
        """Whether all logits of a code were finite. Codes that are drawn from others mean nothing."""
        self.grid_L = torch.arange(config.sequence_length, device=device)
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

    def step_apart(self, images: list[int], starts: list[int], places: list[int], count: int) -> None:
        """Samples `count` cells of some images in one pass, those of each from its own start on. The codes before its
        place stay, and all cells before its start have been read."""
        with self.runner.context():
            self.run_apart(images, starts, places, count)

    def run(self, first: int, cell: int, end: int) -> None:
        """A pass of the tokens that predict the cells from `first` up to `end`, of which those from `cell` on are
        sampled."""
        self.take(slice(None), slice(cell, end))
        tokens_RTC = self.tokens_before(slice(None), slice(first, end)) if first else self.first_tokens(end)
        self.decode(tokens_RTC, self.position(first))

    def run_apart(self, images: list[int], starts: list[int], places: list[int], count: int) -> None:
        """A pass of [`step_apart`]."""
        images_B1, starts_B1, places_B1 = (one_a_row(n, self.codes_BLD.device) for n in (images, starts, places))
        positions = [self.position(start) for start in starts]
        position = positions[0] if len(set(positions)) == 1 else positions * (1 + self.guided)
        self.sample_apart(images_B1, starts_B1 + self.grid_L[:count], places_B1, position)

    def sample_apart(self, images_B1: Tensor, cells_BN: Tensor, places_B1: Tensor, position: Position) -> None:
        """The same, of tensors that are read on the device: this is what is replayed."""
        cells = images_B1, cells_BN
        self.take(*cells)
        final_BND = (cells_BN < places_B1)[:, :, None].expand_as(self.codes_BND)
        self.kept_BND = final_BND if self.kept_BND is None else final_BND | self.kept_BND
        self.decode(self.tokens_before(*cells), position)
        self.codes_BLD[cells], self.finite_BLD[cells] = self.codes_BND, self.finite_BND

    def take(self, images: slice | Tensor, cells: slice | Tensor) -> None:
        """Takes what a pass needs of the cells that it samples: parts of the loop's own for slices, or copies."""
        at = images, cells
        self.noise_BND, self.codes_BND, self.finite_BND = self.noise_BLD[at], self.codes_BLD[at], self.finite_BLD[at]
        self.kept_BND = None if self.kept_BLD is None else self.kept_BLD[at]
        batch, count, _ = self.codes_BND.shape
        self.scales_X1 = self.scales_L[cells].expand(batch, count).reshape(-1, 1) if self.guided else None

    def decode(self, tokens_RTC: Tensor, position: Position) -> None:
        """Has the model choose the codes of the cells that were taken, the last of those that the tokens predict."""
        self.model.decode(tokens_RTC, self.choose, self.runner.decoders, position, self.codes_BND.shape[1])

    def position(self, cell: int) -> int:
        """The position of the token with which a pass begins that predicts a cell and those after it."""
        return cell + self.conditions_RT.shape[1] - 1 if cell else 0

    def first_tokens(self, end: int) -> Tensor:
        """The tokens of the condition, and those that predict the cells after cell 0."""
        tokens_RTC = self.model.condition_tokens(self.conditions_RT)
        if end == 1:
            return tokens_RTC
        return torch.cat([tokens_RTC, self.tokens_before(slice(None), slice(1, end))], dim=1)

    def tokens_before(self, images: slice | Tensor, cells: slice | Tensor) -> Tensor:
        """The tokens of the cells before these."""
        if isinstance(cells, slice):
            cells = slice(cells.start - 1, cells.stop - 1)
            tokens_BTC = self.model.cell_tokens(self.codes_BLD[images, cells], self.grid_L[cells])
        else:
            tokens_BTC = self.model.cell_tokens(self.codes_BLD[images, cells - 1], cells - 1)
        return torch.cat([tokens_BTC, tokens_BTC]) if self.guided else tokens_BTC

    def leave(self, stay: list[int]) -> None:
        """From now on passes are of these rows of the last one only. It copies what was kept of them."""
        rows = torch.tensor(stay, device=self.codes_BLD.device)
        if self.guided:
            rows = torch.cat([rows, rows + len(self.codes_BND)])
        with self.runner.context():
            self.runner.decoders[0].reorder(rows)

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

        Those of the cells that were taken, the last ones, are sampled here; both sequences of an image get the same.
        """
        noise_BN, codes_BN, finite_BN = self.noise_BND[..., k], self.codes_BND[..., k], self.finite_BND[..., k]
        count, tokens = codes_BN.shape[1], hidden_RTC.shape[1]
        # X: images x cells
        logits_XV = self.runner.heads[k](hidden_RTC[:, -count:]).flatten(0, 1).float()
        if self.scales_X1 is not None:
            logits_XV = guide(logits_XV, self.scales_X1)
        self.read_logits(k, logits_XV)
        if self.filters is None:
            codes_X, finite_X = logits_XV.argmax(-1), logits_XV.amax(-1).isfinite()
        else:
            codes_X = draw(filtered(self.filters[k], logits_XV), noise_BN.flatten())
            finite_X = codes_X < logits_XV.shape[-1]
            codes_X = codes_X.clamp_(max=logits_XV.shape[-1] - 1)
        chosen_BN = codes_X.view(-1, count)
        if self.kept_BND is not None:
            chosen_BN = torch.where(self.kept_BND[..., k], codes_BN, chosen_BN)
        finite_BN.copy_(finite_X.view(-1, count))
        codes_BN.copy_(chosen_BN)
        if tokens > count:  # of a pass that also reads what is given
            chosen_BN = self.codes_BLD[:, self.unread - tokens : self.unread, k]
        return torch.cat([chosen_BN, chosen_BN]) if self.guided else chosen_BN


def _padded(values_BLD: Tensor, missing: int) -> Tensor:
    """With so many more images, of zeros."""
    return F.pad(values_BLD, (0, 0, 0, 0, 0, missing))
