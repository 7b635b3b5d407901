"""Statistics of codes, against numpy and scipy, and the compression ratio, worked by hand."""

import numpy as np
import pytest
import torch
from scipy import stats

from dnd_hf.evaluation.code_usage import QUANTILES, code_statistics, information_compression_ratio


@pytest.mark.parametrize(
    ("vocab_size", "depth", "stride", "ratio"),
    [
        (8192, 1, (16, 16), 0.0021158854),  # the paper's 0.21 %: 13 / (24 * 256)
        (16384, 8, (16, 16), 112 / 6144),
        (512, 4, (8, 8), 36 / 1536),
        (4096, 1, (24, 8), 12 / 4608),
    ],
)
def test_the_compression_ratio_is_that_of_the_formula(vocab_size, depth, stride, ratio):
    assert information_compression_ratio(vocab_size, depth, stride) == pytest.approx(ratio)


@pytest.mark.parametrize("counts", [[5, 0, 1, 3, 11, 0], [1, 0, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2]])
def test_statistics_of_codes_are_those_of_all_codes_that_occur(counts):
    norms = np.array([0.5, 9.0, 2.0, 0.1, 1.0, 7.0])
    found = code_statistics(torch.tensor(counts), torch.tensor(norms))
    occurring = np.repeat(norms, counts)
    assert found["usage"] == pytest.approx(np.count_nonzero(counts) / 6)
    assert found["perplexity"] == pytest.approx(np.exp(stats.entropy(counts)))
    assert found["norm_mean"] == pytest.approx(occurring.mean())
    assert found["norm_std"] == pytest.approx(occurring.std(), abs=1e-9)
    assert found["norm_quantiles"] == np.quantile(occurring, QUANTILES, method="inverted_cdf").tolist()
