"""Proves packed products: against float64, with and without oneDNN."""

import pytest
import torch

from dnd_hf.ops.packed_linear import PackedLinear, can_pack


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_are_right_to_the_last_rounding(rows, dtype, roundoff, bias, onednn, monkeypatch):
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 70, generator=generator).to(dtype)
    offset = torch.randn(50, generator=generator).to(dtype) if bias else None
    inputs = torch.randn(rows, 1, 70, generator=generator).to(dtype)
    product = PackedLinear(weight, offset, 3)
    assert product.packed == can_pack(weight) and not (product.packed and not onednn)
    exact = inputs.double() @ weight.double().T + (offset.double() if bias else 0)
    # Sums of 71 terms in float32, each of up to |input| * |weight|, and the result rounded.
    terms = inputs.double().abs() @ weight.double().abs().T + (offset.double().abs() if bias else 0)
    bound = 71 * 2**-24 * terms + roundoff * exact.abs()
    result = product(inputs)
    assert result.dtype == dtype and result.shape == (rows, 1, 50)
    assert ((result.double() - exact).abs() <= bound).all()


def test_other_precisions_and_devices_are_not_packed():
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float16))
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float64))
    assert not can_pack(torch.zeros(2, 2, device="meta"))
    half = PackedLinear(torch.ones(2, 3, dtype=torch.float64), None, 1)
    assert half(torch.ones(1, 3, dtype=torch.float64)).tolist() == [[3, 3]]
