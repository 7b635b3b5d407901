"""The rivals of autoregression in the claim C4: a DDPM of pixels, and flow matching of a tokenizer's latents.

Networks and schedulers are those of diffusers; here stands what a network learns, and how images are drawn from it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ModelMixin,
    PixArtTransformer2DModel,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dnd_hf import RQVAE
from dnd_hf.files import read_json, write_json


@dataclass(frozen=True)
class Sampler:
    """A way from noise to an image.

    Args:
        scheduler: class of diffusers.
        steps: of the scheduler. Heun's method evaluates the network twice a step, the others once.
        settings: of the scheduler, in the place of those it was trained with.
        decode: options of [`Rival.decode`].
    """

    scheduler: type[SchedulerMixin]
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)


class Rival(ABC):
    """A network of diffusers with its scheduler.

    Attributes:
        samplers: by name; the first is the default.
        network, scheduler: what predicts, and the noise that it was trained with.
    """

    samplers: dict[str, Sampler]

    def __init__(self, network: ModelMixin, scheduler: SchedulerMixin):
        self.network, self.scheduler = network, scheduler

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the network sees of an image."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images `(batch, 3, H, W)` in [-1, 1] as `(batch, *shape)` of about unit variance or range."""

    @abstractmethod
    def decode(self, samples: Tensor) -> Tensor:
        """The inverse of `encode`, up to what it loses."""

    @abstractmethod
    def noised(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noised samples, their timesteps `(batch,)`, and what the network is to predict of them.

        Random numbers are those of torch's global generator.
        """

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """What a network, perhaps wrapped, predicts; float32."""
        return network(noisy, timestep=timesteps).sample.float()

    def loss(self, network: nn.Module, clean: Tensor) -> Tensor:
        """Mean squared error of the prediction at random timesteps; `clean`: what `encode` returns."""
        noisy, timesteps, target = self.noised(clean)
        return F.mse_loss(self.predict(network, noisy, timesteps), target)

    @torch.inference_mode()
    def sample(self, seeds: Sequence[int], sampler: str | None = None) -> Tensor:
        """Images `(len(seeds), 3, H, W)`, not clamped; each depends on its seed only, up to rounding.

        Raises:
            KeyError: no such sampler.
        """
        how = self.samplers[sampler or next(iter(self.samplers))]
        scheduler = how.scheduler.from_config(self.scheduler.config, **how.settings)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = randn_tensor((len(generators), *self.shape), generators, self.network.device)
        scheduler.set_timesteps(how.steps)
        for timestep in scheduler.timesteps:
            prediction = self.predict(self.network, x, timestep.expand(len(x)))
            x = scheduler.step(prediction, timestep, x, generator=generators).prev_sample
        return self.decode(x, **how.decode)

    def save(self, folder: Path) -> None:
        """Writes network and scheduler in diffusers' formats."""
        self.network.save_pretrained(folder / "network")
        self.scheduler.save_pretrained(folder / "scheduler")


class PixelDDPM(Rival):
    """Noise prediction on gray pixels with the cosine schedule (arXiv 2006.11239, 2102.09672), the paper's rival.

    Gray, because pages of text are: one channel is easier than three equal ones. Squares of pixels may be laid into
    channels (`patch_size`), which loses nothing: a network of as many parameters then costs less for each image, and
    sees more of them with the same compute.
    """

    samplers = {
        "ddim-50": Sampler(DDIMScheduler, 50, {"timestep_spacing": "trailing"}),
        # Where the schedule ends in nothing but noise, the solver's logarithms need a bound; that of its documentation.
        "dpm-solver-25": Sampler(DPMSolverMultistepScheduler, 25, {"lambda_min_clipped": -5.1}),
        "ddpm-250": Sampler(DDPMScheduler, 250, {"timestep_spacing": "trailing"}),
    }

    @classmethod
    def new(cls, size: tuple[int, int], patch_size: int = 1, **options: Any) -> "PixelDDPM":
        """For images of `size` (height, width), multiples of `patch_size`; `options`: of `UNet2DModel`."""
        cells, channels = (size[0] // patch_size, size[1] // patch_size), patch_size**2
        network = UNet2DModel(sample_size=cells, in_channels=channels, out_channels=channels, **options)
        return cls(network, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))

    @classmethod
    def load(cls, folder: Path) -> "PixelDDPM":
        """What `save` has written."""
        return cls(UNet2DModel.from_pretrained(folder / "network"), DDPMScheduler.from_pretrained(folder / "scheduler"))

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width = self.network.config.sample_size
        return self.network.config.in_channels, height, width

    def encode(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images.mean(1, keepdim=True), isqrt(self.shape[0]))

    def decode(self, samples: Tensor) -> Tensor:
        return F.pixel_shuffle(samples, isqrt(self.shape[0])).expand(-1, 3, -1, -1)

    def noised(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.randn_like(clean)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
        return self.scheduler.add_noise(clean, noise, timesteps), timesteps, noise


class LatentFlow(Rival):
    """Flow matching (arXiv 2210.02747) with a diffusion transformer on the latents of a tokenizer, not quantized.

    Straight paths from data to noise, whose velocity is predicted, at times whose logits are normal (arXiv 2403.03206,
    Section 3.1). The network is diffusers' `PixArtTransformer2DModel` without a text: the DiT of arXiv 2212.09748,
    whose layers share one modulation (arXiv 2310.00426, Section 2.3). diffusers' `DiTTransformer2DModel` takes square
    images only, and spends half of its parameters on a modulation for each layer.
    """

    samplers = {
        "euler-50": Sampler(FlowMatchEulerDiscreteScheduler, 50),
        "heun-25": Sampler(FlowMatchHeunDiscreteScheduler, 25),
        # The decoder was trained on sums of codes: the nearest ones may mend what the flow leaves between them.
        "heun-25-nearest-codes": Sampler(FlowMatchHeunDiscreteScheduler, 25, decode={"nearest_codes": True}),
    }

    def __init__(self, network: ModelMixin, scheduler: SchedulerMixin, vqvae: RQVAE, mean: Tensor, std: Tensor):
        super().__init__(network, scheduler)
        self.vqvae = vqvae.eval().requires_grad_(False)
        self.mean, self.std = mean, std

    @classmethod
    def new(cls, vqvae: RQVAE, images: Tensor, layers: int, heads: int, head_dim: int) -> "LatentFlow":
        """On the latents of a tokenizer; `images` `(n, 3, H, W)`: their latents' mean and deviation by channel scale
        all others."""
        network = PixArtTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=layers,
            in_channels=vqvae.config.vq_embed_dim or vqvae.config.latent_channels,
            out_channels=None,
            sample_size=min(images.shape[2:]) // vqvae.stride,
            patch_size=1,
            cross_attention_dim=None,
            use_additional_conditions=False,
        )
        with torch.inference_mode():
            latents = torch.cat([vqvae.encode(part).latents for part in images.split(64)])
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        return cls(network, FlowMatchEulerDiscreteScheduler(), vqvae, mean.clone(), std.clone())

    @classmethod
    def load(cls, folder: Path) -> "LatentFlow":
        """What `save` has written."""
        scale = read_json(folder / "latents.json")
        return cls(
            PixArtTransformer2DModel.from_pretrained(folder / "network"),
            FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            RQVAE.from_pretrained(folder / "vqvae"),
            torch.tensor(scale["mean"]),
            torch.tensor(scale["std"]),
        )

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.vqvae.save_pretrained(folder / "vqvae")
        write_json(folder / "latents.json", {"mean": self.mean.tolist(), "std": self.std.tolist()})

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width = (size // self.vqvae.stride for size in self.vqvae.config.sample_size)
        return len(self.mean), height, width

    def encode(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            latents = self.vqvae.encode(images).latents.float()
        return (latents - self.mean.to(latents)[:, None, None]) / self.std.to(latents)[:, None, None]

    def decode(self, samples: Tensor, nearest_codes: bool = False) -> Tensor:
        latents = samples * self.std.to(samples)[:, None, None] + self.mean.to(samples)[:, None, None]
        return self.vqvae.decode(latents, force_not_quantize=not nearest_codes).sample

    def noised(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.randn_like(clean)
        share = torch.randn(len(clean), device=clean.device).sigmoid()
        weight = share[:, None, None, None]
        return (1 - weight) * clean + weight * noise, share * self.scheduler.config.num_train_timesteps, noise - clean


def is_rival(folder: str | Path) -> bool:
    """Whether a folder is a result of diffusion.py."""
    return Path(folder, "network").is_dir()


def load_rival(folder: Path) -> Rival:
    """What a rival has saved, for sampling. Raises ValueError for another folder."""
    if not is_rival(folder):
        raise ValueError(f"{folder} is no result of diffusion.py.")
    rival = (LatentFlow if (folder / "vqvae").is_dir() else PixelDDPM).load(folder)
    rival.network.eval()
    return rival


def training_flops(loss: Callable[[], Tensor]) -> int:
    """Floating point operations of a loss and of its gradients, as torch's `FlopCounterMode` counts them.

    Attention is computed in plain matrix products for it, because fused kernels of some devices are not counted.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()
