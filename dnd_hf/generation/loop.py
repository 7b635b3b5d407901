"""The sampling loop: from one grid cell to the next."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoders import ModelRunner
from .filters import logits_filters
from .guidance import guide
from .interface import ImageCodeModel
from .noise import draw
from .settings import SamplingSettings


class SamplingLoop:
    """The sampling of a batch of images: what a call keeps between grid cells, and the step from one to the next.

    The cell is read on the device, so no step waits for it.

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
        self.cell = torch.zeros(1, dtype=torch.int64, device=device)
        self.finite_B = torch.ones(batch, dtype=torch.bool, device=device)
        """Whether all logits of an image were finite. Codes that are drawn from others mean nothing."""
        self.token_RTC: Tensor | None = None
        self.first_position = 0

    def start(self, conditions_BT: Tensor, noise_BLD: Tensor | None, scales: list[float]) -> None:
        """Reads the conditions and goes to cell 0.

        Args:
            conditions_BT: at most as many as there is room for; what is over samples condition 0.
            noise_BLD: uniform float64 in [0, 1); None where no code is sampled.
            scales: the guidance scale of each cell.
        """
        self.images = len(conditions_BT)
        missing = len(self.codes_BLD) - self.images
        conditions_BT = F.pad(conditions_BT, (0, 0, 0, missing))
        if noise_BLD is not None:
            self.noise_BLD.copy_(F.pad(noise_BLD, (0, 0, 0, 0, 0, missing)))
        self.scales_L.copy_(torch.tensor(scales, dtype=torch.float32))
        self.codes_BLD.zero_()
        self.cell.zero_()
        self.finite_B.fill_(True)
        if self.guided:
            conditions_BT = torch.cat([conditions_BT, self.model.null_conditions(conditions_BT)])
        self.first_position = conditions_BT.shape[1] - 1
        with self.runner.context():
            tokens_RTC = self.model.condition_tokens(conditions_BT)
            self.read(tokens_RTC[:, :-1])
            self.set_token(tokens_RTC[:, -1:])

    def read(self, tokens_RTC: Tensor) -> None:
        """Has the first stack keep the keys and values of tokens from which nothing is predicted."""
        if tokens_RTC.shape[1]:
            for layer in self.runner.decoders[0].at(0, tokens_RTC.shape[1]):
                tokens_RTC = layer(tokens_RTC)

    def set_token(self, token_RTC: Tensor) -> None:
        """Keeps the token that the next step reads, always in the same memory."""
        self.token_RTC = token_RTC if self.token_RTC is None else self.token_RTC.copy_(token_RTC)

    def step(self, cell: int) -> None:
        """Samples the codes of a cell; cells come in order, from 0."""
        with self.runner.context():
            assert self.token_RTC is not None, "start() comes first"
            self.model.decode(self.token_RTC, self.choose, self.runner.decoders, self.first_position + cell)
            token_BTC = self.model.cell_tokens(self.codes_BLD[:, self.cell], self.cell)
            self.set_token(token_BTC.repeat(2, 1, 1) if self.guided else token_BTC)
            self.cell += 1

    @property
    def codes(self) -> Tensor:
        """`(images, height, width, depth)`: the codes so far, zeros behind them."""
        return self.codes_BLD[: self.images].unflatten(1, tuple(self.model.config.grid_size))

    def finish(self) -> Tensor:
        """The codes, behind the last step.

        Raises:
            ValueError: they were drawn from logits that are not finite.
        """
        if not self.finite_B[: self.images].all():
            raise ValueError(
                "the logits are not finite numbers (NaN or infinite): the weights are broken or overflow in"
                f" {self.model.dtype}, or `temperature` is too small or `guidance_scale` too large."
            )
        return self.codes

    def release(self) -> None:
        """Ends the call, however it went."""

    def choose(self, k: int, hidden_RTC: Tensor) -> Tensor:
        """The codes `(rows, 1)` of depth k, from what head k reads; both sequences of an image get the same."""
        logits_BV = self.runner.heads[k](hidden_RTC[:, -1]).float()
        if self.guided:
            logits_BV = guide(logits_BV, self.scales_L[self.cell])
        if self.filters is None:
            codes_B, finite_B = logits_BV.argmax(-1), logits_BV.amax(-1).isfinite()
        else:
            codes_B = draw(self.filters[k](None, logits_BV), self.noise_BLD[:, self.cell, k].squeeze(1))
            finite_B = codes_B < logits_BV.shape[-1]
            codes_B = codes_B.clamp_(max=logits_BV.shape[-1] - 1)
        self.finite_B.logical_and_(finite_B)
        self.codes_BLD[:, self.cell, k] = codes_B[:, None]
        return (codes_B.repeat(2) if self.guided else codes_B)[:, None]
