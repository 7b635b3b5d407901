"""Proves the search for nearest codes: exact, whatever the pieces, and the same in one graph of fixed shapes."""

import pytest
import torch

from dnd_hf.ops import nearest_codes
from dnd_hf.ops.nearest_codes import DISTANCE_CHUNK, NearestCodes, nearest_codes_in_graph


def random_vectors(n: int = 200, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def test_codes_are_exact_where_float32_distances_are_all_noise():
    generator = torch.Generator().manual_seed(0)
    codebook = 1000 + 0.01 * torch.randn(64, 8, generator=generator)
    vectors = 1000 + 0.01 * torch.randn(300, 8, generator=generator)
    expected = (vectors.double()[:, None] - codebook.double()[None]).square().sum(-1).argmin(1)
    naive = (codebook.square().sum(1) - 2 * vectors @ codebook.T).argmin(1)
    assert (naive != expected).any()
    assert torch.equal(NearestCodes(codebook)(vectors), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_elements", [1, 7 * 32, 1000, DISTANCE_CHUNK])
def test_codes_do_not_depend_on_the_chunk_size(chunk_elements, dtype):
    # the last vectors lie midway between entries: exactly where rounding would decide
    codebook, vectors = random_vectors(32, seed=0), random_vectors()
    midway = (codebook[:16] + codebook[16:]) / 2
    vectors = torch.cat([vectors, midway]).to(dtype)
    alone = torch.cat([NearestCodes(codebook)(vector[None]) for vector in vectors])
    assert torch.equal(NearestCodes(codebook, chunk_elements)(vectors), alone)


@pytest.mark.parametrize("codes_at_once", [5, 64])
@pytest.mark.parametrize("offset", [0, 1000])
def test_the_search_in_one_graph_finds_the_same_codes(offset, codes_at_once, monkeypatch):
    monkeypatch.setattr(nearest_codes, "CODES_IN_GRAPH", codes_at_once)
    codebook, vectors = offset + random_vectors(64, seed=0), offset + random_vectors()
    expected = NearestCodes(codebook)(vectors)
    assert torch.equal(nearest_codes_in_graph(vectors, codebook), expected) and len(expected.unique()) > 16
