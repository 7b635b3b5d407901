"""Search for the nearest entries of a codebook: exact, in pieces, or in one graph of fixed shapes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed_linear import PackedLinear


# Elements of the (vectors x codebook) distance matrix that are held at a time: 8 MB of float32, which the caches of a
# CPU hold, or 256 MB.
DISTANCE_CHUNK, DISTANCE_CHUNK_GPU = 2**21, 2**26
CODES_IN_GRAPH = 4096


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
                doubts = again[start : start + self.rows]
                codes[doubts] = self._exactly(vectors[doubts].float())
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
        near = ~(scores > (scores.amin(1) + self._margin(vectors))[:, None])  # so that overflow leaves some
        candidates = near.any(0).nonzero().squeeze(1)
        exact = self.codebook[candidates].double()
        return candidates[torch.addmm(exact.square().sum(1), vectors.double(), exact.T, alpha=-2).argmin(1)]


def nearest_codes_in_graph(vectors: Tensor, codebook: Tensor) -> Tensor:
    """What [`NearestCodes`] finds, in operations whose shapes do not depend on the values, for compiled graphs.

    All distances are computed in float64, `CODES_IN_GRAPH` codes at a time.

    Args:
        vectors: `(n, dim)`, any floating dtype.
        codebook: `(num_codes, dim)`.

    Returns:
        The indices `(n,)`, int64 in `[0, num_codes)`.
    """
    vectors = vectors.double()
    lowest = torch.full(vectors.shape[:1], torch.inf, dtype=torch.float64, device=vectors.device)
    codes = torch.zeros(vectors.shape[:1], dtype=torch.int64, device=vectors.device)
    for start in range(0, len(codebook), CODES_IN_GRAPH):
        part = codebook[start : start + CODES_IN_GRAPH].double()
        distances, indices = torch.addmm(part.square().sum(1), vectors, part.T, alpha=-2).min(1)
        nearer = distances < lowest
        lowest, codes = torch.where(nearer, distances, lowest), torch.where(nearer, indices + start, codes)
    return codes


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
