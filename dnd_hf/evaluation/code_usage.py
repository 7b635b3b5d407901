"""How a tokenizer uses its codes: the share in use, their entropy, the norms of their vectors, the bits they take."""

from math import log2

import torch
from torch import Tensor


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def information_compression_ratio(vocab_size: int, depth: int, stride: tuple[int, int]) -> float:
    """Bits of the codes over bits of the 24-bit image: `d log2(N) / (24 f^2)` (arXiv 2410.01912, Section 3.1).

    `stride` is (rows, columns), the pixels that one position stands for; their product is the paper's f^2.
    """
    return depth * log2(vocab_size) / (24 * stride[0] * stride[1])


def code_perplexity(counts: Tensor) -> Tensor:
    """Exponential of the entropy (nats) of codes that occur `counts` `(..., codes)` times: `(...)`, in [1, codes]."""
    return torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1).exp()


def code_statistics(counts: Tensor, norms: Tensor) -> dict:
    """How the codes of one depth are used, and how long their vectors are (arXiv 2410.01912, Figure 4).

    Args:
        counts: (codes,), how often each code occurs; at least one does.
        norms: (codes,), the Euclidean length of each code's vector.

    Returns:
        `usage`, the share of codes that occur; `perplexity`, the exponential of the entropy of the code (nats), in
        [1, codes]; of the norms, each as often as its code occurs: `norm_mean`, `norm_std` (population) and
        `norm_quantiles`, those of `QUANTILES` (the smallest norm that at least this share does not exceed).
    """
    counts, norms = counts.double().cpu(), norms.double().cpu()
    shares = counts / counts.sum()
    mean = (shares * norms).sum()
    order = norms.argsort()
    cumulative = counts[order].cumsum(0)
    places = torch.searchsorted(cumulative, torch.tensor(QUANTILES).double() * cumulative[-1])
    return {
        "usage": (counts > 0).double().mean().item(),
        "perplexity": code_perplexity(counts).item(),
        "norm_mean": mean.item(),
        "norm_std": (shares * (norms - mean).square()).sum().sqrt().item(),
        "norm_quantiles": norms[order][places].tolist(),
    }
