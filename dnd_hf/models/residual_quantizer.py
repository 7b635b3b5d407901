"""Residual vector quantization: nearest codes, EMA codebooks, restarts of unused codes."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.packed_linear import PackedLinear


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
