"""RQVAE of dnd_hf (Apache-2.0), written by `DnDPipeline.save_pretrained`.

The installed dnd_hf is used where there is one, otherwise this copy of its code.
"""

import importlib
import importlib.util


if importlib.util.find_spec("dnd_hf"):
    RQVAE = importlib.import_module("dnd_hf").RQVAE
else:
    """Matrix products on CPUs with a copy of the weight in oneDNN's own layout, as `torch.compile` packs frozen weights."""

    import torch
    import torch.nn.functional as F
    from torch import Tensor


    def can_pack(tensor: Tensor) -> bool:
        """Whether oneDNN is there for the device and the precision of a tensor."""
        if tensor.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if tensor.dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return tensor.dtype == torch.float32


    class PackedLinear:
        """`inputs @ weight.T + bias` without gradients; the weight is packed where that can be done.

        Args:
            weight: `(out_features, in_features)`.
            bias: `(out_features,)` or None.
            rows: about how many rows the inputs will have.
        """

        def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
            self.packed = can_pack(weight)
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows) if self.packed else weight
            self.bias = bias

        def __call__(self, inputs: Tensor) -> Tensor:
            if self.packed:
                return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
            return F.linear(inputs, self.weight, self.bias)


    """Residual vector quantization: nearest codes, EMA codebooks, restarts of unused codes."""

    import math

    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, nn



    # Elements of the (vectors x codebook) distance matrix that are held at a time: 8 MB of float32, which the caches of a
    # CPU hold, or 256 MB.
    DISTANCE_CHUNK, DISTANCE_CHUNK_GPU = 2**21, 2**26


    class NearestCodes:
        """Search for the entries of a codebook that are nearest to vectors (Euclidean).

        Distances are computed in float32, `chunk_elements` at a time. Where float32 rounding could decide between entries,
        these are compared in float64, so the answer is that of an exact search and depends neither on the other vectors nor
        on the chunk size, unless two exact distances agree to float64 rounding.

        Args:
            codebook: `(num_codes, dim)` float32; it must not change while this is in use.
            chunk_elements: memory bound of one chunk of distances, in elements; default: by the kind of device.
        """

        @torch.no_grad()
        def __init__(self, codebook: Tensor, chunk_elements: int | None = None):
            self.codebook = codebook.float()
            if chunk_elements is None:
                chunk_elements = DISTANCE_CHUNK_GPU if codebook.is_cuda else DISTANCE_CHUNK
            self.rows = max(1, chunk_elements // len(codebook))
            # |v - c|^2 without |v|^2, which is the same for every entry, and halved: |c|^2 / 2 - v.c
            squared_norms = self.codebook.square().sum(1)
            self.largest_norm = squared_norms.max().sqrt()
            self.scores = PackedLinear(-self.codebook, squared_norms / 2, self.rows)

        @torch.no_grad()
        def __call__(self, vectors: Tensor) -> Tensor:
            """The indices `(n,)`, int64 in `[0, num_codes)`, for vectors `(n, dim)` of any floating dtype."""
            codes = vectors.new_empty(len(vectors), dtype=torch.int64)
            doubtful = vectors.new_empty(len(vectors), dtype=torch.bool)
            with torch.autocast(vectors.device.type, enabled=False):
                for start in range(0, len(vectors), self.rows):
                    chunk = slice(start, start + self.rows)
                    part = vectors[chunk].float()
                    lowest, codes[chunk] = _two_lowest(self.scores(part))
                    doubtful[chunk] = lowest[:, -1] <= lowest[:, 0] + self._margin(part)
                again = doubtful.nonzero().squeeze(1)
                for start in range(0, len(again), self.rows):
                    chunk = again[start : start + self.rows]
                    codes[chunk] = self._exactly(vectors[chunk].float())
            return codes

        def _margin(self, vectors: Tensor) -> Tensor:
            # A score is off by up to (dim + 2) * 2^-24 * (|c|^2 / 2 + |v||c|), on a GPU that may round factors to TF32 by
            # 2^-9 of that sum more; two may swap within twice that.
            rounding = (vectors.shape[1] + 2) * 2.0**-24
            if vectors.is_cuda and torch.get_float32_matmul_precision() != "highest":
                rounding += 2.0**-9
            return 2 * rounding * self.largest_norm * (self.largest_norm / 2 + vectors.norm(dim=1))

        def _exactly(self, vectors: Tensor) -> Tensor:
            """Compares in float64 those entries that may be the nearest of some vector; of equals, the first is taken."""
            scores = self.scores(vectors)
            near = scores <= (scores.amin(1) + self._margin(vectors))[:, None]
            candidates = near.any(0).nonzero().squeeze(1)
            exact = self.codebook[candidates].double()
            return candidates[torch.addmm(exact.square().sum(1), vectors.double(), exact.T, alpha=-2).argmin(1)]


    def _two_lowest(scores: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest two scores `(n, 2)` of each row `(n, num_codes)`, and the index `(n,)` of the lowest.

        They lie in the two groups of columns with the lowest minima, which one fast pass finds.
        """
        columns = scores.shape[1]
        groups = scores.unflatten(1, (-1, math.gcd(columns, 128)))
        chosen = groups.amin(2).topk(min(2, groups.shape[1]), largest=False).indices
        candidates = groups.take_along_dim(chosen[..., None], dim=1).flatten(1)
        lowest, at = candidates.topk(min(2, columns), largest=False)
        size = groups.shape[2]
        codes = chosen.gather(1, at[:, :1] // size) * size + at[:, :1] % size
        return F.pad(lowest, (0, 2 - lowest.shape[1]), value=torch.inf), codes.squeeze(1)


    class ResidualQuantizer(nn.Module):
        """Residual quantizer of RQ-VAE (arXiv 2203.01941, Section 3.1) with exponential-moving-average codebooks.

        `r_0 = v;  q_k = nearest(r_{k-1});  r_k = r_{k-1} - q_k`; the sum of the `q_k` approximates `v`.

        The codebooks are buffers, not parameters, and stay float32 whatever dtype the model is cast to. A forward pass in
        training mode updates them once from the vectors of all depths: counts and sums are added over all processes, so
        every process holds the same codebook. A code whose moving count falls below one is restarted, together with its
        moving averages, from a vector of the global batch.

        Args:
            num_codes: size N of each codebook.
            dim: length of a code vector.
            depth: number of residual codes d of one vector.
            shared: one codebook for all depths, or one each.
            decay: EMA decay of the codebook, in [0, 1).
            restart_unused_codes: whether codes that are no longer used are restarted.
            normalize_codes: code vectors are scaled to unit length wherever they are used (LlamaGen, arXiv 2406.06525,
                Section 2.1); vectors must then come with unit length, and the depth must be 1.
        """

        epsilon = 1e-5  # Laplace smoothing of the cluster sizes

        def __init__(
            self,
            num_codes: int,
            dim: int,
            depth: int,
            shared: bool = True,
            decay: float = 0.99,
            restart_unused_codes: bool = True,
            normalize_codes: bool = False,
        ):
            super().__init__()
            for name, value in (("num_codes", num_codes), ("dim", dim), ("depth", depth)):
                if value < 1:
                    raise ValueError(f"`{name}` must be at least 1, got {value}.")
            if not 0 <= decay < 1:
                raise ValueError(f"`decay` must lie in [0, 1), got {decay}.")
            if normalize_codes and depth > 1:
                raise ValueError(f"`depth` must be 1 with `normalize_codes` (residuals have no unit length), got {depth}.")
            self.num_codes, self.dim, self.depth, self.shared = num_codes, dim, depth, shared
            self.decay, self.restart_unused_codes, self.normalize_codes = decay, restart_unused_codes, normalize_codes
            num_codebooks = 1 if shared else depth
            self.register_buffer("codebooks", torch.randn(num_codebooks, num_codes, dim))
            self.register_buffer("cluster_sizes", torch.ones(num_codebooks, num_codes))
            self.register_buffer("embedding_sums", self.codebooks.clone())
            self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

        def _apply(self, fn, recurse=True):
            # A codebook rounded to half precision gives other codes: follow the device, never the dtype.
            def keep_dtype(tensor):
                moved = fn(tensor.flatten()[:0])
                return fn(tensor) if moved.dtype == tensor.dtype else tensor.to(moved.device)

            return super()._apply(keep_dtype, recurse)

        def codebook(self, depth: int) -> Tensor:
            """The `(num_codes, dim)` codebook of a 0-based depth."""
            codebook = self.codebooks[0 if self.shared else depth]
            return F.normalize(codebook, dim=-1) if self.normalize_codes else codebook

        @torch.no_grad()
        def encode(self, vectors: Tensor) -> Tensor:
            """Residual codes of vectors `(..., dim)`: int64 `(..., depth)`, greedy depth by depth."""
            residual = vectors.detach().reshape(-1, self.dim).float()
            codes, search = [], None
            for k in range(self.depth):
                if k == 0 or not self.shared:
                    search = NearestCodes(self.codebook(k))
                codes.append(search(residual))
                residual = residual - F.embedding(codes[-1], self.codebook(k))
            return torch.stack(codes, dim=-1).view(*vectors.shape[:-1], self.depth)

        def decode(self, codes: Tensor, depth: int | None = None) -> Tensor:
            """The float32 sum `(..., dim)` of the first `depth` (default: all) code vectors of `(..., depth)` codes."""
            return sum(F.embedding(codes[..., k], self.codebook(k)) for k in range(depth or codes.shape[-1]))

        def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Quantizes vectors `(..., dim)`; in training mode the codebooks are updated afterwards.

            Returns:
                The quantized vectors (same shape and dtype; the gradient passes straight through to `vectors`), the codes
                `(..., depth)`, and the scalar commitment loss: the mean over k of the mean squared difference between the
                vectors and the sum of their first k code vectors (arXiv 2203.01941, Eq. 6, per element).
            """
            codes = self.encode(vectors)
            partial, loss, exact = 0, 0, vectors.float()
            for k in range(self.depth):
                partial = partial + F.embedding(codes[..., k], self.codebook(k))
                loss = loss + F.mse_loss(exact, partial)
            quantized = vectors + (partial - exact).detach().to(vectors.dtype)
            if self.training:
                self._update(exact.detach().reshape(-1, self.dim), codes.reshape(-1, self.depth))
            return quantized, codes, loss / self.depth

        @torch.no_grad()
        def _update(self, vectors: Tensor, codes: Tensor) -> None:
            counts, sums = torch.zeros_like(self.cluster_sizes), torch.zeros_like(self.embedding_sums)
            residual = vectors
            for k in range(self.depth):
                book = 0 if self.shared else k
                counts[book] += torch.bincount(codes[:, k], minlength=self.num_codes)
                sums[book].index_add_(0, codes[:, k], residual)
                residual = residual - F.embedding(codes[:, k], self.codebook(k))
            if dist.is_initialized():
                dist.all_reduce(counts)
                dist.all_reduce(sums)
            self.cluster_sizes.lerp_(counts, 1 - self.decay)
            self.embedding_sums.lerp_(sums, 1 - self.decay)
            if self.restart_unused_codes:
                for book in range(len(self.codebooks)):
                    self._restart(book, vectors, codes)
            totals = self.cluster_sizes.sum(1, keepdim=True)
            smoothed = totals * (self.cluster_sizes + self.epsilon) / (totals + self.num_codes * self.epsilon)
            torch.div(self.embedding_sums, smoothed[..., None], out=self.codebooks)
            self.num_updates += 1

        def _restart(self, book: int, vectors: Tensor, codes: Tensor) -> None:
            unused = (self.cluster_sizes[book] < 1).nonzero().squeeze(1)
            if not len(unused):
                return
            # Candidates are the residuals of all depths that this codebook serves, in the batch of all processes. Every
            # process draws the same ones (the seed is the update count) and contributes those it owns.
            depths = self.depth if self.shared else 1
            first, total = _place_in_global_batch(vectors)
            generator = torch.Generator().manual_seed(int(self.num_updates) * len(self.codebooks) + book)
            draws = torch.randperm(total * depths, generator=generator)
            draws = draws.repeat(-(-len(unused) // len(draws)))[: len(unused)].to(vectors.device)
            position, depth = draws // depths - first, (draws % depths if self.shared else torch.full_like(draws, book))
            mine = (position >= 0) & (position < len(vectors))
            position = position.clamp(0, len(vectors) - 1)
            chosen = vectors[position]
            for k in range(self.depth - 1):
                deeper = (depth > k).nonzero().squeeze(1)
                steps = F.embedding(codes[position[deeper], k], self.codebook(k))
                chosen.index_add_(0, deeper, steps, alpha=-1)
            chosen *= mine[:, None]
            if dist.is_initialized():
                dist.all_reduce(chosen)
            if len(unused) > total * depths:  # vectors drawn twice must not make equal codes
                noise = torch.rand(chosen.shape, generator=generator).to(chosen.device)
                chosen = chosen + noise * 0.01 * chosen.std() / self.dim**0.5
            self.embedding_sums[book, unused] = chosen
            self.cluster_sizes[book, unused] = 1


    def _place_in_global_batch(vectors: Tensor) -> tuple[int, int]:
        """How many vectors the processes before this one hold, and how many all hold."""
        if not dist.is_initialized():
            return 0, len(vectors)
        lengths = [vectors.new_tensor(len(vectors), dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, lengths[dist.get_rank()].clone())
        lengths = [int(length) for length in lengths]
        return sum(lengths[: dist.get_rank()]), sum(lengths)


    """RQVAE: a convolutional autoencoder whose latent grid is quantized to residual codes (arXiv 2203.01941)."""

    from collections.abc import Callable
    from dataclasses import dataclass

    import torch
    import torch.nn.functional as F
    from diffusers import ModelMixin
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
    from diffusers.utils import BaseOutput
    from diffusers.utils.accelerate_utils import apply_forward_hook
    from torch import Tensor, nn



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


    class RQVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
        """Residual-quantized VAE: image `(batch, 3, H, W)` in [-1, 1] <-> codes `(batch, height, width, depth)`.

        The defaults are the paper's tokenizer for 256-pixel images (stride 16, 16,384 codes, arXiv 2410.01912, Section 4).
        The stride is `2 ** (len(block_out_channels) - 1)`; images and grids may be rectangular.

        Args:
            down_block_types: one of diffusers' encoder blocks a level, e.g. `"DownEncoderBlock2D"`; `None`: attention
                (`"AttnDownEncoderBlock2D"`) at the last level alone.
            up_block_types: one of diffusers' decoder blocks a level, lowest resolution first; `None`: the mirror image.
            block_out_channels: channels of each level, highest resolution first; multiples of `norm_num_groups`.
            layers_per_block: residual blocks of an encoder level (the decoder has one more).
            latent_channels: channels between encoder and quantizer.
            vq_embed_dim: length of a code vector; `None`: `latent_channels`.
            num_vq_embeddings: codebook size N.
            sample_size: image size the model is trained at, pixels, an int or (height, width). Other sizes work.
            code_depth: residual codes a position, d.
            shared_codebook: one codebook for all depths, or one each.
            code_patch_size: (rows, columns) of latent cells that share one position's codes.
            ema_decay, restart_unused_codes: see [`ResidualQuantizer`].
            commitment_weight: factor of the commitment loss in the training loss.
            norm_num_groups: groups of the group normalisations.
            mid_block_add_attention: attention in the middle blocks.
            normalize_codes: latent and code vectors are compared, and decoded, at unit length, as in LlamaGen's
                tokenizers (arXiv 2406.06525, Section 2.1); depth 1 only.

        Raises:
            ValueError: lists of different lengths, or sizes the blocks cannot have.
        """

        _supports_gradient_checkpointing = True
        _no_split_modules = ["ResnetBlock2D"]
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
        ):
            super().__init__()
            levels = len(block_out_channels)
            down_block_types = down_block_types or ("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",)
            up_block_types = up_block_types or ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1)
            for name, types in (("down_block_types", down_block_types), ("up_block_types", up_block_types)):
                if len(types) != levels:
                    raise ValueError(f"`{name}` has {len(types)} entries, `block_out_channels` {levels}: must be equal.")
            for channels in block_out_channels:
                if channels % norm_num_groups:
                    raise ValueError(
                        f"`block_out_channels` must be multiples of `norm_num_groups` {norm_num_groups}, got {channels}."
                    )
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
            height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
            self.grid_size = tuple(max(1, size // step) for size, step in zip((height, width), self.code_stride))
            self.tile_size = tuple(cells * step for cells, step in zip(self.grid_size, self.code_stride))  # pixels

        @apply_forward_hook
        def encode(self, images: Tensor, return_dict: bool = True) -> RQVAEEncoderOutput | tuple[Tensor, ...]:
            """Images `(batch, in_channels, H, W)` in [-1, 1], H and W multiples of `code_stride`, to latents and codes.

            The codebooks are never updated here. Raises ValueError on any other image shape.
            """
            latents = self._encode(images)
            cells = self._to_cells(latents)
            codes = self.quantizer.encode(cells)
            losses = [F.mse_loss(cells.float(), self.quantizer.decode(codes, k + 1)) for k in range(codes.shape[-1])]
            output = RQVAEEncoderOutput(latents=latents, codes=codes, commitment_loss=torch.stack(losses).mean())
            return output if return_dict else output.to_tuple()

        @apply_forward_hook
        def decode(
            self, latents: Tensor, force_not_quantize: bool = False, return_dict: bool = True
        ) -> DecoderOutput | tuple[Tensor]:
            """Latents `(batch, vq_embed_dim, height, width)`, quantized first unless `force_not_quantize`, to images."""
            if not force_not_quantize:
                quantized = self.quantizer.decode(self.quantizer.encode(self._to_cells(latents)))
                latents = self._from_cells(quantized.to(latents.dtype))
            sample = self._decode(latents)
            return DecoderOutput(sample=sample) if return_dict else (sample,)

        @apply_forward_hook
        def decode_codes(
            self, codes: Tensor, depth: int | None = None, return_dict: bool = True
        ) -> DecoderOutput | tuple[Tensor]:
            """Codes `(batch, height, width, code_depth)` to images `(batch, out_channels, H, W)`, not clamped.

            Args:
                codes: integers in `[0, num_vq_embeddings)`, any grid size.
                depth: use the first `depth` codes of each position alone, a coarse-to-fine preview; `None`: all.

            Raises:
                ValueError: codes of another shape, dtype or range, or a depth outside `[1, code_depth]`.
            """
            limit = self.config.code_depth
            if codes.ndim != 4 or codes.shape[-1] != limit:
                raise ValueError(f"`codes` must be (batch, height, width, {limit}), got shape {tuple(codes.shape)}.")
            if codes.is_floating_point() or codes.dtype == torch.bool:
                raise ValueError(f"`codes` must be integers, got {codes.dtype}.")
            if depth is not None and not 1 <= depth <= limit:
                raise ValueError(f"`depth` must lie in [1, {limit}], got {depth}.")
            codes = codes.long()
            if not torch.compiler.is_compiling() and codes.numel():
                low, high = (bound.item() for bound in codes.aminmax())
                if low < 0 or high >= self.config.num_vq_embeddings:
                    raise ValueError(f"`codes` must lie in [0, {self.config.num_vq_embeddings}), got {low} to {high}.")
            sample = self._decode(self._from_cells(self.quantizer.decode(codes, depth).to(self.dtype)))
            return DecoderOutput(sample=sample) if return_dict else (sample,)

        def forward(
            self, images: Tensor, quantize: bool = True, return_dict: bool = True
        ) -> RQVAEOutput | tuple[Tensor, ...]:
            """Reconstructs images `(batch, in_channels, H, W)`; in training mode the codebooks are updated.

            Without `quantize` the decoder gets the latents as they are, a warm-up of training: there are no codes then, the
            commitment loss is 0, and the codebooks stay as they were.
            """
            if not quantize:
                latents = self._encode(images)
                output = RQVAEOutput(sample=self._decode(latents), codes=None, commitment_loss=latents.new_zeros(()))
                return output if return_dict else output.to_tuple()
            quantized, codes, commitment_loss = self.quantizer(self._to_cells(self._encode(images)))
            output = RQVAEOutput(
                sample=self._decode(self._from_cells(quantized)), codes=codes, commitment_loss=commitment_loss
            )
            return output if return_dict else output.to_tuple()

        def _encode(self, images: Tensor) -> Tensor:
            channels, (row_stride, column_stride) = self.config.in_channels, self.code_stride
            fits = images.ndim == 4 and images.shape[1] == channels and min(images.shape[2:]) > 0
            if not fits or images.shape[2] % row_stride or images.shape[3] % column_stride:
                raise ValueError(
                    f"`images` must be (batch, {channels}, height, width) with height a multiple of {row_stride} and width"
                    f" of {column_stride}, got shape {tuple(images.shape)}."
                )
            return self._in_parts(lambda x: self.quant_conv(self.encoder(x)), images, self.tile_size, 1 / self.stride)

        def _decode(self, latents: Tensor) -> Tensor:
            tile = tuple(size // self.stride for size in self.tile_size)
            return self._in_parts(lambda x: self.decoder(self.post_quant_conv(x)), latents, tile, self.stride)

        def _to_cells(self, latents: Tensor) -> Tensor:
            # (batch, channels, H, W) -> (batch, height, width, rows * columns * channels)
            rows, columns = self.config.code_patch_size
            batch, channels, height, width = latents.shape
            cells = latents.view(batch, channels, height // rows, rows, width // columns, columns)
            cells = cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, height // rows, width // columns, -1)
            return F.normalize(cells, dim=-1) if self.config.normalize_codes else cells

        def _from_cells(self, cells: Tensor) -> Tensor:
            rows, columns = self.config.code_patch_size
            batch, height, width, _ = cells.shape
            latents = cells.view(batch, height, width, rows, columns, -1).permute(0, 5, 1, 3, 2, 4)
            return latents.reshape(batch, -1, height * rows, width * columns)

        def _in_parts(self, fn: Callable, x: Tensor, tile: tuple[int, int], scale: float) -> Tensor:
            if self.use_slicing and len(x) > 1:
                return torch.cat([self._in_parts(fn, part, tile, scale) for part in x.split(1)])
            if self.use_tiling and (x.shape[2] > tile[0] or x.shape[3] > tile[1]):
                return _tiled(fn, x, tile, scale)
            return fn(x)


    def _initialize(module: nn.Module) -> None:
        # Variance-preserving: PyTorch's default shrinks the signal by sqrt(3) at each convolution of the skip path, so that
        # little of a picture reaches the codes of an untrained model.
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)


    def _tiled(fn: Callable, x: Tensor, tile: tuple[int, int], scale: float) -> Tensor:
        """Applies `fn`, which scales height and width by `scale`, to overlapping tiles and blends them linearly."""
        unit = max(1, round(1 / scale))  # tiles start where `scale` gives whole numbers
        starts = []
        for length, size in zip(x.shape[2:], tile):
            last = max(0, length - size)
            step = max(unit, size * 3 // 4 // unit * unit)  # overlap by a quarter
            starts.append([*range(0, last, step), last])
        output = weight = None
        for top in starts[0]:
            for left in starts[1]:
                part = fn(x[:, :, top : top + tile[0], left : left + tile[1]])
                if output is None:
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
