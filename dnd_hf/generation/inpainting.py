"""Inpainting that looks at what comes after: sequential Monte Carlo over the raster order.

Sampling a hole code by code sees only the given codes before each. A particle filter (Doucet and Johansen, "A tutorial
on particle filtering and smoothing", 2011, Section 4) keeps several continuations, weights each by the probability that
it gives to the given codes it meets, and resamples them when few have most of the weight.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from transformers import GenerationMixin

from ..ops.number_checks import whole_number
from .decoders import plain_runner
from .evaluation_mode import evaluation_mode
from .given_codes import GivenCodes, checked_given_codes
from .guidance import guidance_scales
from .loop import SamplingLoop
from .noise import checked_generators, uniform_noise
from .packed_decoder import can_run_packed, packed_runner
from .settings import SamplingSettings


LOGITS_OF_A_PASS = 2**26
"""At most about so many logits are made when given codes are weighed."""


class ParticleLoop(SamplingLoop):
    """A sampling loop of `num_particles` continuations of each image, which stand side by side.

    The weights are those of the guided logits at the temperature of the sampling, but without top-k and top-p, which
    could make a given code impossible.
    """

    def follow(self, num_particles: int, temperature: Sequence[float], given: GivenCodes, uniform_BE: Tensor) -> None:
        """Takes what decides the particles; called behind `start`.

        Args:
            num_particles: of each image.
            temperature: of each depth.
            given: the given codes of the images.
            uniform_BE: uniform float64 in [0, 1), `(images, sequence_length + 1)`: of the resampling after each cell,
                and the last of the choice of one particle.
        """
        self.num_particles, self.temperature, self.given, self.uniform_BE = (
            num_particles,
            temperature,
            given,
            uniform_BE,
        )
        self.log_weights_BN = torch.zeros(
            len(uniform_BE), num_particles, dtype=torch.float64, device=self.codes_BLD.device
        )
        self.weighed = False

    def read_logits(self, k: int, logits_XV: Tensor) -> None:
        """Adds the log-probability of the given codes to the weights."""
        kept_RT = cast(Tensor, self.kept_BND)[..., k]
        log_probs_XV = (logits_XV / self.temperature[k]).log_softmax(-1)
        log_probs_RT = log_probs_XV.gather(-1, self.codes_BND[..., k].reshape(-1, 1)).view(kept_RT.shape)
        added_R = log_probs_RT.double().masked_fill(~kept_RT, 0).sum(1)
        self.log_weights_BN += added_R.view(self.log_weights_BN.shape)

    def advance(self, cell: int) -> None:
        """Goes one cell further. Given cells are weighed together, at the last of them; those before the hole never."""
        whole_L = self.given.whole_L
        if whole_L[cell]:
            if not self.weighed or (cell + 1 < len(whole_L) and whole_L[cell + 1]):
                return
            first = cell
            while whole_L[first - 1]:
                first -= 1
            rows = self.conditions_RT.shape[0]
            at_once = max(1, LOGITS_OF_A_PASS // (rows * self.model.config.vocab_size))
            if len(self.runner.decoders) > 1:  # the decoder of depths has room for one cell of each sequence
                at_once = 1
            for start in range(first, cell + 1, at_once):
                self.step(start, min(at_once, cell + 1 - start))
        else:
            self.step(cell)
            self.weighed = True
        self.resample(cell)

    def resample(self, cell: int) -> None:
        """Systematic resampling, of the images whose effective sample size is below half the number of particles."""
        weights_BN = self.log_weights_BN.softmax(-1)
        poor_B = 1 / weights_BN.square().sum(-1) < self.num_particles / 2
        if not poor_B.any():
            return
        teeth_BN = torch.arange(self.num_particles, device=weights_BN.device) + self.uniform_BE[:, cell, None]
        ancestors_BN = torch.searchsorted(weights_BN.cumsum(-1), teeth_BN / self.num_particles, right=True)
        stay_BN = torch.arange(self.num_particles, device=weights_BN.device).expand_as(ancestors_BN)
        ancestors_BN = torch.where(poor_B[:, None], ancestors_BN.clamp(max=self.num_particles - 1), stay_BN)
        first_B1 = torch.arange(len(weights_BN), device=weights_BN.device)[:, None] * self.num_particles
        rows_R = (first_B1 + ancestors_BN).flatten()
        self.codes_BLD.copy_(self.codes_BLD[rows_R])
        self.log_weights_BN.masked_fill_(poor_B[:, None], 0)
        # A further decoder reads the depths of one cell, and begins anew at the next.
        self.runner.decoders[0].reorder(torch.cat([rows_R, rows_R + len(rows_R)]) if self.guided else rows_R)

    def drawn(self) -> Tensor:
        """`(images, height, width, depth)`: of each image one particle, drawn by its weight."""
        cumulative_BN = self.log_weights_BN.softmax(-1).cumsum(-1)
        chosen_B1 = torch.searchsorted(cumulative_BN, self.uniform_BE[:, -1:].contiguous(), right=True)
        chosen_B = chosen_B1.squeeze(1).clamp(max=self.num_particles - 1)
        images = torch.arange(len(chosen_B), device=chosen_B.device)
        codes = self.codes_BLD.unflatten(1, tuple(self.model.config.grid_size)).unflatten(0, (-1, self.num_particles))
        return codes[images, chosen_B]


class InpaintingMixin(GenerationMixin):
    """Adds `inpaint` to a model that has what [`ImageCodeModel`] says."""

    @torch.no_grad()
    @apply_forward_hook
    def inpaint(
        self,
        class_labels: Tensor | Sequence[int] | int,
        codes: Tensor,
        codes_mask: Tensor,
        num_particles: int,
        generator: torch.Generator | int | Sequence[torch.Generator | int] | None = None,
        callback: Callable[[int, Tensor], bool | None] | None = None,
        **settings,
    ) -> Tensor:
        """Samples the codes that are not given, with regard to all that are, also those that come later.

        As `num_particles` grows, the distribution becomes that of the model given these codes. One particle is what
        `generate(codes=, codes_mask=)` does. An image costs as much as `num_particles` images. It runs without CUDA
        graphs.

        Args:
            class_labels, codes, codes_mask, generator, callback: as in `generate`. The callback sees the codes of the
                first particle of each image.
            num_particles: N; the particles are resampled when their effective sample size falls below N / 2.
            settings: the sampling settings of `generate`, by name; `do_sample` must not be False.

        Returns:
            `(batch, height, width, depth)` int64 in `[0, vocab_size)`.

        Raises:
            ValueError: an argument out of its range; nothing has been computed then. Or, at the end of the loop: the
                logits were not finite numbers.
        """
        config, count = self.config, whole_number("num_particles", num_particles)
        conditions_BT = self.check_conditions(class_labels)
        resolved = SamplingSettings.resolve(config, self.generation_config, **settings)
        if not resolved.do_sample:
            raise ValueError("`do_sample` must not be False with particles: all would be the same.")
        batch, device = len(conditions_BT), conditions_BT.device
        shape = (batch, *config.grid_size, config.code_depth)
        given = checked_given_codes(codes, codes_mask, shape, config.vocab_size, device)
        if given is None:
            raise ValueError("`codes` and `codes_mask` must be given: what is to be kept.")
        generator = checked_generators(generator, batch)
        repeated = [one for one in generator for _ in range(count)] if isinstance(generator, list) else generator
        noise_RLD = uniform_noise((batch * count, config.sequence_length, config.code_depth), repeated, device)
        uniform_BE = uniform_noise((batch, config.sequence_length + 1), generator, device)
        scales = guidance_scales(
            resolved.guidance_scale, resolved.guidance_schedule, resolved.guidance_power, config.sequence_length
        )
        conditions_RT = conditions_BT.repeat_interleave(count, 0)
        rows = len(conditions_RT) * (2 if resolved.guided else 1)
        runner = packed_runner(self, rows) if can_run_packed(self) else plain_runner(self, rows, device)
        loop = ParticleLoop(self, runner, len(conditions_RT), resolved, device)
        particles = GivenCodes(
            given.codes_BLD.repeat_interleave(count, 0), given.mask_BLD.repeat_interleave(count, 0), given.whole_L
        )
        with evaluation_mode(self):
            loop.start(conditions_RT, noise_RLD, scales, particles)
            loop.follow(count, resolved.temperature, given, uniform_BE)
            for cell in range(config.sequence_length):
                loop.advance(cell)
                if callback is not None and callback(cell, loop.codes_up_to(cell)[::count]) is True:
                    break
        loop.check_finite(cell)
        return loop.drawn()
