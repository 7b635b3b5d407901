"""Proves the checks of values: what they refuse by name, and that compiled graphs do not look."""

import pytest
import torch

from dnd_hf.ops import tensor_checks
from dnd_hf.ops.tensor_checks import check_finite, check_integers


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0, 1], "`codes` must be a tensor, got list"),
        (torch.zeros(2), "`codes` must be integers, got torch.float32"),
        (torch.zeros(2, dtype=torch.bool), "`codes` must be integers, got torch.bool"),
        (torch.zeros(2, dtype=torch.complex64), "`codes` must be integers, got torch.complex64"),
        (torch.tensor([3, -1]), r"`codes` must lie in \[0, 5\), got -1 to 3"),
        (torch.tensor([[5]], dtype=torch.uint8), r"`codes` must lie in \[0, 5\), got 5 to 5"),
        (torch.tensor([-100]), r"`codes` must lie in \[0, 5\), got -100 to -100"),
    ],
)
def test_other_than_integers_in_range_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=message):
        check_integers("codes", value, 5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_in_range_pass(dtype):
    check_integers("codes", torch.arange(5, dtype=dtype), 5)
    check_integers("codes", torch.empty(0, dtype=dtype), 5)
    check_integers("codes", torch.arange(5, dtype=dtype, device="meta"), 5)


def test_the_ignored_value_passes_beside_the_range():
    check_integers("labels", torch.tensor([-100, 0, 4]), 5, ignored=-100)
    with pytest.raises(ValueError, match=r"`labels` must lie in \[0, 5\) or be -100, got -100 to 5"):
        check_integers("labels", torch.tensor([-100, 5]), 5, ignored=-100)


def test_where_the_host_may_not_look_the_device_asserts_the_range(monkeypatch):
    monkeypatch.setattr(tensor_checks, "can_look", lambda tensor: False)
    with pytest.raises(RuntimeError, match=r"`codes` must lie in \[0, 5\)"):  # on a CPU, at once
        check_integers("codes", torch.tensor([5]), 5)
    with pytest.raises(ValueError, match=r"`codes` must lie in \[0, 5\), got 5 to 5"):
        check_integers("codes", torch.tensor([5]), 5, wait=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_by_name(value):
    check_finite("images", torch.zeros(3))
    with pytest.raises(ValueError, match="`images` must be finite"):
        check_finite("images", torch.tensor([0, value]))


def test_a_compiled_graph_looks_at_no_value():
    def checked(codes, images):
        check_integers("codes", codes, 5)
        check_finite("images", images)
        return codes + 1

    compiled = torch.compile(checked, backend="eager", fullgraph=True)
    assert compiled(torch.tensor([7]), torch.tensor([torch.nan])).item() == 8
