"""Residual vector quantization: EMA codebooks, straight-through gradients, restarts of unused codes."""

from functools import reduce

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.nearest_codes import NearestCodes, nearest_codes_in_graph
from ..ops.number_checks import check_share, whole_number
from ..ops.tensor_checks import check_finite


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
    codebooks: Tensor
    cluster_sizes: Tensor
    embedding_sums: Tensor
    num_updates: Tensor

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
            whole_number(name, value)
        check_share("decay", decay)
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

    def encode(self, vectors: Tensor) -> Tensor:
        """Residual codes of vectors `(..., dim)`: int64 `(..., depth)`, greedy depth by depth.

        Raises ValueError where a vector is not finite; a compiled graph does not look.
        """
        check_finite("vectors", vectors)
        return self._nearest(vectors)

    @torch.no_grad()
    def _nearest(self, vectors: Tensor) -> Tensor:
        residual = vectors.detach().reshape(-1, self.dim).float().nan_to_num(0, 0, 0)
        codes = []
        search: NearestCodes | None = None
        for k in range(self.depth):
            codebook = self.codebook(k)
            if torch.compiler.is_compiling():
                codes.append(nearest_codes_in_graph(residual, codebook))
            else:
                if search is None or not self.shared:
                    search = NearestCodes(codebook)
                codes.append(search(residual))
            residual = residual - F.embedding(codes[-1], codebook)
        return torch.stack(codes, dim=-1).view(*vectors.shape[:-1], self.depth)

    def decode(self, codes: Tensor, depth: int | None = None) -> Tensor:
        """The float32 sum `(..., dim)` of the first `depth` (default: all) code vectors of `(..., depth)` codes."""
        depths = range(depth or codes.shape[-1])
        return reduce(torch.add, (F.embedding(codes[..., k], self.codebook(k)) for k in depths))

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes vectors `(..., dim)`; in training mode the codebooks are updated afterwards.

        A vector that is not finite is an error in evaluation mode. In training mode it makes the loss NaN, on whichever
        process it is, and leaves all codebooks as they were: so the training loop can stop where it looks at the loss,
        with a codebook that is sound, and no step waits for the device because of this.

        Returns:
            The quantized vectors (same shape and dtype; the gradient passes straight through to `vectors`), the codes
            `(..., depth)`, and the scalar commitment loss: the mean over k of the mean squared difference between the
            vectors and the sum of their first k code vectors (arXiv 2203.01941, Eq. 6, per element).
        """
        codes = self._nearest(vectors) if self.training else self.encode(vectors)
        exact = vectors.float()
        partial, loss = torch.zeros_like(exact), exact.new_zeros(())
        for k in range(self.depth):
            partial = partial + F.embedding(codes[..., k], self.codebook(k))
            loss = loss + F.mse_loss(exact, partial)
        quantized = vectors + (partial - exact).detach().to(vectors.dtype)
        if self.training:
            self._update(exact.detach().reshape(-1, self.dim), codes.reshape(-1, self.depth))
        return quantized, codes, loss / self.depth

    @torch.compiler.disable
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
        sound = sums.isfinite().all()  # the same on all processes
        self.cluster_sizes.lerp_(torch.where(sound, counts, self.cluster_sizes), 1 - self.decay)
        self.embedding_sums.lerp_(torch.where(sound, sums, self.embedding_sums), 1 - self.decay)
        if self.restart_unused_codes:
            for book in range(len(self.codebooks)):
                self._restart(book, vectors, codes, (self.cluster_sizes[book] < 1) & sound)
        totals = self.cluster_sizes.sum(1, keepdim=True)
        smoothed = totals * (self.cluster_sizes + self.epsilon) / (totals + self.num_codes * self.epsilon)
        self.codebooks.copy_(torch.where(sound, self.embedding_sums / smoothed[..., None], self.codebooks))
        self.num_updates += sound

    def _restart(self, book: int, vectors: Tensor, codes: Tensor, unused: Tensor) -> None:
        unused = unused.nonzero().squeeze(1)
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
    counts = [int(length) for length in lengths]
    return sum(counts[: dist.get_rank()]), sum(counts)
