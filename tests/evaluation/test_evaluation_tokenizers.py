"""Which depths of a tokenizer are measured."""

from types import SimpleNamespace

import pytest

from dnd_hf.evaluation.tokenizers import check_depths


def test_depths_are_sorted_and_kept_within_those_of_the_tokenizer():
    vae = SimpleNamespace(config=SimpleNamespace(code_depth=4))
    assert check_depths(vae, None) == check_depths(vae, []) == [1, 2, 3, 4]
    assert check_depths(vae, [4, 1, 4]) == [1, 4]
    for wrong in ([0], [5], [1, 5]):
        with pytest.raises(ValueError, match=r"`depths` must lie in \[1, 4\]"):
            check_depths(vae, wrong)
