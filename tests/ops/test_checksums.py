"""Proves the checksum of a tensor: every change of a number and every reordering gives another one."""

import pytest
import torch

from dnd_hf.ops.checksums import checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (40, 768), (2, 512)])
def test_a_change_of_any_one_number_gives_another_checksum(shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksum(values)
    assert checksum(values.clone()) == before
    flat = values.view(-1)
    places = torch.linspace(0, len(flat) - 1, 50).long().unique().tolist()
    seen = {before}
    for place in places:
        old = flat[place].clone()
        flat[place] = torch.nextafter(old, torch.tensor(torch.inf, dtype=dtype))
        seen.add(checksum(values))
        flat[place] = old
    assert len(seen) == len(places) + 1 and checksum(values) == before


def test_reordering_rows_columns_or_halves_gives_another_checksum():
    values = torch.randn(64, 768, generator=torch.Generator().manual_seed(0)).bfloat16()
    others = [values.flip(0), values.flip(1), values.roll(1, 0), values.roll(512, 1), values.roll(4, 1), values.T]
    swapped = values.clone()
    swapped[[3, 5]] = swapped[[5, 3]]
    assert len({checksum(one) for one in (values, *others, swapped)}) == 8


def test_the_checksum_is_that_of_the_numbers_whatever_memory_they_lie_in():
    values = torch.randn(9, 14, generator=torch.Generator().manual_seed(0)).bfloat16()
    padded = torch.zeros(11, 17, dtype=torch.bfloat16)
    padded[1:10, 1:15] = values
    assert checksum(padded[1:10, 1:15]) == checksum(values)
    shifted = torch.cat([values.new_zeros(1), values.flatten()])[1:]
    assert checksum(shifted) == checksum(values)
