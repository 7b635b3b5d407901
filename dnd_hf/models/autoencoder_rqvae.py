"""RQVAE: a convolutional autoencoder whose latent grid is quantized to residual codes (arXiv 2203.01941)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.activations import ACT2CLS
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ..ops.cpu_precision import warn_of_slow_precision
from ..ops.number_checks import check_not_negative, check_share, height_width, whole_number
from ..ops.tensor_checks import can_look, check_finite, check_integers
from .loading import LoadingMixin
from .residual_quantizer import ResidualQuantizer


RQVAE_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
LARGEST_RQVAE_SIZES = {  # beyond which a configuration is taken for a mistake, or for an attack
    "in_channels": 2**10,
    "out_channels": 2**10,
    "layers_per_block": 2**8,
    "latent_channels": 2**16,
    "vq_embed_dim": 2**16,
    "num_vq_embeddings": 2**24,
    "code_depth": 2**10,
    "norm_num_groups": 2**16,
}


@dataclass
class RQVAEEncoderOutput(BaseOutput):
    """Output of [`RQVAE.encode`].

    Args:
        latents: `(batch, vq_embed_dim, H / stride, W / stride)`, before quantization.
        codes: `(batch, height, width, depth)` int64 in `[0, num_vq_embeddings)`.
        commitment_loss: scalar, not yet multiplied by `commitment_weight`.
    """

    latents: Tensor
    codes: Tensor | None = None
    commitment_loss: Tensor | None = None


@dataclass
class RQVAEOutput(BaseOutput):
    """Output of [`RQVAE.forward`].

    Args:
        sample: `(batch, out_channels, H, W)`, the reconstruction, about [-1, 1] (not clamped).
        codes: `(batch, height, width, depth)` int64 in `[0, num_vq_embeddings)`.
        commitment_loss: scalar, not yet multiplied by `commitment_weight`.
    """

    sample: Tensor
    codes: Tensor | None = None
    commitment_loss: Tensor | None = None


class RQVAE(LoadingMixin, ModelMixin, AutoencoderMixin, ConfigMixin):
    """Residual-quantized VAE: image `(batch, 3, H, W)` in [-1, 1] <-> codes `(batch, height, width, depth)`.

    The defaults are the paper's tokenizer for 256-pixel images (stride 16, 16,384 codes, arXiv 2410.01912, Section 4).
    The stride is `2 ** (len(block_out_channels) - 1)`; images and grids may be rectangular.

    Args:
        down_block_types: one of diffusers' encoder blocks for each level, e.g. `"DownEncoderBlock2D"`; `None`:
            attention (`"AttnDownEncoderBlock2D"`) only at the last level.
        up_block_types: one of diffusers' decoder blocks for each level, lowest resolution first; `None`: the mirror
            image.
        block_out_channels: channels of each level, highest resolution first; multiples of `norm_num_groups`.
        layers_per_block: residual blocks of an encoder level (the decoder has one more).
        latent_channels: channels between encoder and quantizer.
        vq_embed_dim: length of a code vector; `None`: `latent_channels`.
        num_vq_embeddings: codebook size N.
        sample_size: image size the model is trained at, pixels, an int or (height, width). Other sizes work.
        code_depth: residual codes per position, d.
        shared_codebook: one codebook for all depths, or one each.
        code_patch_size: (rows, columns) of latent cells that share one position's codes.
        ema_decay, restart_unused_codes: see [`ResidualQuantizer`].
        commitment_weight: factor of the commitment loss in the training loss.
        norm_num_groups: groups of the group normalisations.
        mid_block_add_attention: attention in the middle blocks.
        normalize_codes: latent and code vectors are compared, and decoded, at unit length, as in LlamaGen's
            tokenizers (arXiv 2406.06525, Section 2.1); depth 1 only.
        local_encoder: each position is encoded from only its own `code_stride` pixels, as if an image. Its codes
            then do not depend on neighbours that an autoregressive model has not written yet; the decoder sees all
            positions. For text whose letters stand in the grid; not of the paper.

    Raises:
        ValueError: lists of different lengths, or sizes the blocks cannot have.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D"]
    _repeated_blocks = ["ResnetBlock2D"]
    _keep_in_fp32_modules = ["quantizer"]
    _skip_layerwise_casting_patterns = ["quantizer"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] | None = None,
        up_block_types: tuple[str, ...] | None = None,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 256,
        vq_embed_dim: int | None = None,
        num_vq_embeddings: int = 16384,
        sample_size: int | tuple[int, int] = 256,
        code_depth: int = 2,
        shared_codebook: bool = True,
        code_patch_size: tuple[int, int] = (1, 1),
        ema_decay: float = 0.99,
        restart_unused_codes: bool = True,
        commitment_weight: float = 0.25,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        normalize_codes: bool = False,
        local_encoder: bool = False,
    ):
        super().__init__()
        _check_config(self.config)
        levels = len(block_out_channels)
        down_block_types = down_block_types or ("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",)
        up_block_types = up_block_types or ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1)
        vq_embed_dim = vq_embed_dim or latent_channels
        sizes = dict(
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.encoder = Encoder(in_channels, latent_channels, down_block_types, double_z=False, **sizes)
        self.quant_conv = nn.Conv2d(latent_channels, vq_embed_dim, 1)
        self.quantizer = ResidualQuantizer(
            num_vq_embeddings,
            vq_embed_dim * code_patch_size[0] * code_patch_size[1],
            code_depth,
            shared_codebook,
            ema_decay,
            restart_unused_codes,
            normalize_codes,
        )
        self.post_quant_conv = nn.Conv2d(vq_embed_dim, latent_channels, 1)
        self.decoder = Decoder(latent_channels, out_channels, up_block_types, **sizes)

        self.apply(_initialize)
        for module in self.modules():
            if isinstance(module, nn.SiLU):
                module.inplace = True  # of a norm's output, which nothing else reads

        self.stride = 2 ** (levels - 1)
        self.code_stride = tuple(self.stride * cells for cells in code_patch_size)
        self.use_slicing = False
        self.use_tiling = False
        sample_size = height_width("sample_size", sample_size)
        self.grid_size = tuple(max(1, size // step) for size, step in zip(sample_size, self.code_stride))
        self.tile_size = tuple(cells * step for cells, step in zip(self.grid_size, self.code_stride))  # pixels

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        # `auto_map` is for those who have no dnd_hf, and not an argument.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @apply_forward_hook
    def encode(
        self, images: Tensor, return_dict: bool = True, tiled: bool | None = None
    ) -> RQVAEEncoderOutput | tuple[Tensor, ...]:
        """Images `(batch, in_channels, H, W)` in [-1, 1], H and W multiples of `code_stride`, to latents and codes.

        The codebooks are never updated here. Raises ValueError on any other image shape, and on images or weights whose
        latents are not finite (a compiled graph does not look).

        Args:
            tiled: whether images larger than `sample_size` are encoded in tiles of that size, which overlap and are
                blended; `None`: as `enable_tiling()` says.
        """
        latents = self._encode(images, tiled)
        _check_latents(latents, images)
        cells = self.cell_vectors(latents)
        codes = self.quantizer.encode(cells)
        losses = [F.mse_loss(cells.float(), self.quantizer.decode(codes, k + 1)) for k in range(codes.shape[-1])]
        output = RQVAEEncoderOutput(latents=latents, codes=codes, commitment_loss=torch.stack(losses).mean())
        return output if return_dict else output.to_tuple()

    @apply_forward_hook
    def decode(
        self, latents: Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents `(batch, vq_embed_dim, height, width)`, quantized first unless `force_not_quantize`, to images.

        Raises ValueError on any other shape or type, and on latents that are to be quantized and are not finite.
        """
        self._check_decoded(latents)
        if not force_not_quantize:
            check_finite("latents", latents)
            quantized = self.quantizer.decode(self.quantizer.encode(self.cell_vectors(latents)))
            latents = self._from_cells(quantized.to(latents.dtype))
        sample = self._decode(latents)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def decode_codes(
        self, codes: Tensor, depth: int | None = None, return_dict: bool = True, tiled: bool | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Codes `(batch, height, width, code_depth)` to images `(batch, out_channels, H, W)`, not clamped.

        Args:
            codes: integers in `[0, num_vq_embeddings)`, any grid size.
            depth: use only the first `depth` codes of each position, a coarse-to-fine preview; `None`: all.
            tiled: as in [`encode`].

        Raises:
            ValueError: codes of another shape, dtype or range, or a depth outside `[1, code_depth]`.
        """
        limit = self.config.code_depth
        check_integers("codes", codes, self.config.num_vq_embeddings, wait=True)
        if codes.ndim != 4 or codes.shape[-1] != limit or min(codes.shape) == 0:
            raise ValueError(f"`codes` must be (batch, height, width, {limit}), got shape {tuple(codes.shape)}.")
        if depth is not None:
            depth = whole_number("depth", depth, maximum=limit)
        sample = self._decode(self._from_cells(self.quantizer.decode(codes.long(), depth).to(self.dtype)), tiled)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self, images: Tensor, quantize: bool = True, return_dict: bool = True
    ) -> RQVAEOutput | tuple[Tensor, ...]:
        """Reconstructs images `(batch, in_channels, H, W)`; in training mode the codebooks are updated.

        Without `quantize` the decoder gets the latents as they are, a warm-up of training: there are no codes then, the
        commitment loss is 0, and the codebooks stay as they were.

        Images that are not finite are an error. Only in training mode on a GPU they make the outputs NaN instead, and
        so the loss, with no wait for the device; the codebooks stay as they were then (see [`ResidualQuantizer`]).
        """
        latents = self._encode(images)
        if not self.training:
            _check_latents(latents, images)
        elif can_look(images):
            check_finite("images", images)
        if not quantize:
            output = RQVAEOutput(sample=self._decode(latents), codes=None, commitment_loss=latents.new_zeros(()))
            return output if return_dict else output.to_tuple()
        quantized, codes, commitment_loss = self.quantizer(self.cell_vectors(latents))
        output = RQVAEOutput(
            sample=self._decode(self._from_cells(quantized)), codes=codes, commitment_loss=commitment_loss
        )
        return output if return_dict else output.to_tuple()

    def cell_vectors(self, latents: Tensor) -> Tensor:
        """What the quantizer reads of latents `(batch, vq_embed_dim, H, W)`: a vector for each code cell.

        Returns:
            `(batch, height, width, dim)`; a cell of several latent positions has their channels one after the other.
        """
        rows, columns = self.config.code_patch_size
        batch, channels, height, width = latents.shape
        cells = latents.view(batch, channels, height // rows, rows, width // columns, columns)
        cells = cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, height // rows, width // columns, -1)
        return F.normalize(cells, dim=-1) if self.config.normalize_codes else cells

    def _encode(self, images: Tensor, tiled: bool | None = None) -> Tensor:
        channels, (row_stride, column_stride) = self.config.in_channels, self.code_stride
        if not isinstance(images, Tensor) or not images.is_floating_point():
            given = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"`images` must be a floating-point tensor with values in [-1, 1], got {given}.")
        fits = images.ndim == 4 and images.shape[1] == channels and min(images.shape) > 0
        if not fits or images.shape[2] % row_stride or images.shape[3] % column_stride:
            raise ValueError(
                f"`images` must be (batch, {channels}, height, width) with height a multiple of {row_stride} and width"
                f" of {column_stride}, got shape {tuple(images.shape)}."
            )
        warn_of_slow_precision(images.device, self.dtype)
        scale = 1 / self.stride
        if self.config.local_encoder:  # the same in tiles and whole
            return self._in_parts(self._encode_positions, images, self.tile_size, scale, tiled=False)
        return self._in_parts(lambda x: self.quant_conv(self.encoder(x)), images, self.tile_size, scale, tiled)

    def _encode_positions(self, images: Tensor) -> Tensor:
        (rows, columns), (batch, channels, height, width) = self.code_stride, images.shape
        parts = images.reshape(batch, channels, height // rows, rows, width // columns, columns)
        latents = self.quant_conv(self.encoder(parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, rows, columns)))
        cells = latents.permute(0, 2, 3, 1).reshape(batch, height // rows, width // columns, -1)
        return self._from_cells(cells)

    def _check_decoded(self, latents: Tensor) -> None:
        channels, (rows, columns) = self.post_quant_conv.in_channels, self.config.code_patch_size
        fits = isinstance(latents, Tensor) and latents.is_floating_point() and latents.ndim == 4
        fits = fits and latents.shape[1] == channels and min(latents.shape) > 0
        if not fits or latents.shape[2] % rows or latents.shape[3] % columns:
            given = f"{latents.dtype} {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(
                f"`latents` must be floating-point (batch, {channels}, height, width) with height a multiple of {rows}"
                f" and width of {columns}, got {given}."
            )

    def _decode(self, latents: Tensor, tiled: bool | None = None) -> Tensor:
        warn_of_slow_precision(latents.device, self.dtype)
        tile = tuple(size // self.stride for size in self.tile_size)
        return self._in_parts(lambda x: self.decoder(self.post_quant_conv(x)), latents, tile, self.stride, tiled)

    def _from_cells(self, cells: Tensor) -> Tensor:
        rows, columns = self.config.code_patch_size
        batch, height, width, _ = cells.shape
        latents = cells.view(batch, height, width, rows, columns, -1).permute(0, 5, 1, 3, 2, 4)
        return latents.reshape(batch, -1, height * rows, width * columns)

    def _in_parts(
        self, fn: Callable, x: Tensor, tile: tuple[int, int], scale: float, tiled: bool | None = None
    ) -> Tensor:
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._in_parts(fn, part, tile, scale, tiled) for part in x.split(1)])
        if (self.use_tiling if tiled is None else tiled) and (x.shape[2] > tile[0] or x.shape[3] > tile[1]):
            return _tiled(fn, x, tile, scale)
        return fn(x)


def _check_config(config: Mapping) -> None:
    """Raises ValueError on what no RQVAE can have; the message names it."""
    for name, largest in LARGEST_RQVAE_SIZES.items():
        if name != "vq_embed_dim" or config[name] is not None:
            whole_number(name, config[name], maximum=largest)
    channels, groups = config["block_out_channels"], config["norm_num_groups"]
    for name in ("block_out_channels", *(name for name in RQVAE_BLOCKS if config[name] is not None)):
        if not isinstance(config[name], list | tuple):
            raise ValueError(f"`{name}` must be a list with an entry for each level, got {config[name]!r}.")
    levels = len(channels)
    if not 1 <= levels <= 16:
        raise ValueError(f"`block_out_channels` must have 1 to 16 levels, got {levels}.")
    for number in channels:
        if whole_number("block_out_channels", number, maximum=2**16) % groups:
            raise ValueError(f"`block_out_channels` must be multiples of `norm_num_groups` {groups}, got {number}.")
    for name, known in RQVAE_BLOCKS.items():
        types = config[name] or known[:1] * levels
        if len(types) != levels:
            raise ValueError(f"`{name}` has {len(types)} entries, `block_out_channels` {levels}: must be equal.")
        if not set(types) <= set(known):
            raise ValueError(f"`{name}` must each be one of {known}, got {types}.")
    height_width("sample_size", config["sample_size"], maximum=2**16)
    patch = config["code_patch_size"]
    height_width("code_patch_size", patch, maximum=2**8)
    if not isinstance(patch, list | tuple) or len(patch) != 2:
        raise ValueError(f"`code_patch_size` must be (rows, columns), got {patch}.")
    check_share("ema_decay", config["ema_decay"])
    check_not_negative("commitment_weight", config["commitment_weight"])
    if not isinstance(config["act_fn"], str) or config["act_fn"] not in ACT2CLS:
        raise ValueError(f"`act_fn` must be one of {', '.join(ACT2CLS)}, got {config['act_fn']!r}.")
    switches = "shared_codebook", "restart_unused_codes", "mid_block_add_attention", "normalize_codes", "local_encoder"
    for name in switches:
        if not isinstance(config[name], bool):
            raise ValueError(f"`{name}` must be True or False, got {config[name]!r}.")


def _check_latents(latents: Tensor, images: Tensor) -> None:
    if torch.compiler.is_compiling() or latents.is_meta or latents.isfinite().all():
        return
    check_finite("images", images)
    raise ValueError(
        f"the latents of finite `images` are not finite: weights are broken or too large for {latents.dtype}."
    )


def _initialize(module: nn.Module) -> None:
    # Variance-preserving: PyTorch's default shrinks the signal by sqrt(3) at each convolution of the skip path, so that
    # little of an image reaches the codes of an untrained model.
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _tiled(fn: Callable, x: Tensor, tile: tuple[int, int], scale: float) -> Tensor:
    """Applies `fn`, which scales height and width by `scale`, to overlapping tiles and blends them linearly."""
    unit = max(1, round(1 / scale))  # tiles start where `scale` gives whole numbers
    starts = []
    for length, size in zip(x.shape[2:], tile):
        last = max(0, length - size)
        step = max(unit, size * 3 // 4 // unit * unit)  # overlap by a quarter
        starts.append([*range(0, last, step), last])
    output = weight = torch.empty(0)
    for top in starts[0]:
        for left in starts[1]:
            part = fn(x[:, :, top : top + tile[0], left : left + tile[1]])
            if not len(weight):
                output = part.new_zeros(*part.shape[:2], *(round(length * scale) for length in x.shape[2:]))
                weight = part.new_zeros(output.shape[2:])
            ramps = [1 - (torch.arange(n, device=x.device) * 2 + 1 - n).abs() / (n + 1) for n in part.shape[2:]]
            window = torch.outer(*ramps).to(part.dtype)
            rows, columns = (
                slice(round(start * scale), round(start * scale) + n) for start, n in zip((top, left), part.shape[2:])
            )
            output[:, :, rows, columns] += part * window
            weight[rows, columns] += window
    return output / weight
