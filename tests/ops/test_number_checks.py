"""Proves what is taken as a count, a size, a share or a positive number, and that all else is refused by name."""

import numpy as np
import pytest

from dnd_hf.ops.number_checks import check_not_negative, check_positive, check_share, height_width, whole_number


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_of_any_kind_are_whole_numbers(value):
    result = whole_number("depth", value)
    assert result == 3 and type(result) is int


@pytest.mark.parametrize("value", [True, np.bool_(True), 3.0, np.float32(3), 2.5, NAN, "3", None, [3]])
def test_booleans_fractions_and_other_things_are_no_whole_numbers(value):
    with pytest.raises(ValueError, match="`depth` must be a whole number, got"):
        whole_number("depth", value)


def test_whole_numbers_stay_in_their_range():
    assert whole_number("depth", 0, minimum=0) == 0 and whole_number("depth", 7, maximum=7) == 7
    with pytest.raises(ValueError, match="`depth` must be at least 1, got 0"):
        whole_number("depth", 0)
    with pytest.raises(ValueError, match="`depth` must be at most 7, got 8"):
        whole_number("depth", 8, maximum=7)


def test_one_number_is_a_square_and_two_are_height_and_width():
    assert height_width("size", 8) == height_width("size", [8]) == height_width("size", np.int32(8)) == (8, 8)
    assert height_width("size", [8, 16]) == height_width("size", (8, np.int64(16))) == (8, 16)


@pytest.mark.parametrize("value", [0, -2, 8.0, True, None, "8", "88", [], [0, 8], [8, -1], [8, 8.5], [8, 8, 8], {8: 8}])
def test_other_sizes_are_refused_by_name(value):
    with pytest.raises(ValueError, match="`size`"):
        height_width("size", value)


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, NAN, INF, True, False, "0.5", None])
def test_a_share_lies_between_0_and_1(value):
    for share in (0, 0.0, 0.5, np.float32(0.999)):
        check_share("dropout", share)
    with pytest.raises(ValueError, match=r"`dropout` must lie in \[0, 1\), got"):
        check_share("dropout", value)


@pytest.mark.parametrize("value", [0, 0.0, -1e-5, NAN, INF, -INF, True, "1", None])
def test_a_positive_number_is_finite_and_greater_than_0(value):
    for number in (1, 1e-300, np.float32(2)):
        check_positive("eps", number)
    with pytest.raises(ValueError, match="`eps` must be finite and greater than 0, got"):
        check_positive("eps", value)


@pytest.mark.parametrize("value", [-1e-5, NAN, INF, True, "1", None])
def test_a_number_that_is_not_negative_is_finite_and_at_least_0(value):
    for number in (0, 0.0, 1e-300, 2):
        check_not_negative("weight", number)
    with pytest.raises(ValueError, match="`weight` must be finite and at least 0, got"):
        check_not_negative("weight", value)
