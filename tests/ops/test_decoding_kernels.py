"""Proves the compiled kernels of decoding: against float64, for sizes that fill vectors and sizes that do not."""

import pytest
import torch
import torch.nn.functional as F

from dnd_hf.ops import decoding_kernels as module
from dnd_hf.ops.decoding_kernels import decoding_kernels


ROUNDOFF = {torch.float32: 2**-22, torch.bfloat16: 2**-8}
dtypes = pytest.mark.parametrize("dtype", ROUNDOFF)
widths = pytest.mark.parametrize("width", [1, 16, 24, 70, 768])


@pytest.fixture(scope="module")
def kernels():
    built = decoding_kernels()
    if built is None:
        pytest.skip("no C++ compiler here")
    return built


def random(*shape, dtype, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(result: torch.Tensor, exact: torch.Tensor) -> None:
    """As close as numbers of the result's precision can be, for values around 1."""
    bound = ROUNDOFF[result.dtype] * (exact.abs() + 1)
    assert ((result.double() - exact).abs() <= bound).all()


@dtypes
@widths
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_of_sums_are_right_to_the_last_rounding(norm, width, dtype, kernels):
    hidden, branch = random(3, 2, width, dtype=dtype), random(3, 2, width, dtype=dtype, seed=1)
    weight, bias = random(width, dtype=dtype, seed=2), random(width, dtype=dtype, seed=3) if norm == "layer" else None

    def exact(values):
        values = values.double()
        if bias is None:
            return F.rms_norm(values, (width,), weight.double(), 1e-2)
        return F.layer_norm(values, (width,), weight.double(), bias.double(), 1e-2)

    total, normed = kernels.add_norm(hidden, branch, weight, bias, 1e-2)
    assert torch.equal(total, hidden + branch)
    assert_close(normed, exact(total))
    same, normed = kernels.add_norm(hidden, None, weight, bias, 1e-2)
    assert torch.equal(same, hidden)
    assert_close(normed, exact(hidden))


@dtypes
@widths
def test_the_gated_activation_is_right_to_the_last_rounding(width, dtype, kernels):
    both = 5 * random(3, 2, 2 * width, dtype=dtype)
    gate, up = both.double().chunk(2, -1)
    result, exact = kernels.silu_mul(both), F.silu(gate) * up
    assert ((result.double() - exact).abs() <= ROUNDOFF[dtype] * (exact.abs() + 0.1)).all()


def rotary_tables(length, dim, dtype):
    """Cosines and signed sines of random angles, `(length, 1, dim)`."""
    angles = random(length, 1, dim // 2, dtype=torch.float32, seed=99)
    cos, sin = (torch.cat(parts, -1).to(dtype) for parts in ([angles.cos()] * 2, [-angles.sin(), angles.sin()]))
    return cos, sin


@dtypes
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "count"), [(12, 12, 64, 1), (4, 2, 8, 3), (4, 1, 72, 2), (2, 2, 7, 1), (2, 2, 136, 5)]
)
def test_attention_is_that_of_all_tokens_so_far_whatever_memory_held_before(
    heads, kv_heads, dim, count, rotary, dtype, kernels
):
    if rotary and dim % 2:
        pytest.skip("pairs")
    rows, width = 3, kernels.vector_width()
    blocks = -(-40 // width)
    keys = torch.full((5, kv_heads, blocks, dim, width), torch.nan, dtype=dtype)
    values = torch.full((5, kv_heads, blocks * width, dim), torch.nan, dtype=dtype)
    cos, sin = rotary_tables(40, dim, dtype) if rotary else (None, None)
    seen = []
    for position in range(0, 40 - count + 1, count):
        qkv = random(rows, count, heads + 2 * kv_heads, dim, dtype=dtype, seed=position)
        tokens, places = qkv.double(), slice(position, position + count)
        if rotary:
            turned = tokens[:, :, : heads + kv_heads]
            turned = turned * cos[places].double() + turned.roll(dim // 2, -1) * sin[places].double()
            tokens = torch.cat([turned, tokens[:, :, heads + kv_heads :]], 2)
        seen.append(tokens)
        query, key, value = torch.cat(seen, 1).transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
        key = key.to(dtype).double()  # as it is kept
        exact = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        result = kernels.attend(qkv, cos, sin, keys, values, torch.tensor([position]), dim**-0.5)
        # Scores are sums of `dim` terms in float32, of keys that may be rounded the other way where they are turned.
        key, value = (part.repeat_interleave(heads // kv_heads, 1) for part in (key, value))
        sums = (query.abs() @ key.abs().mT).amax() * dim**-0.5
        wrong = (dim + 4) * 2**-24 * sums + (2**-8 * sums if rotary and dtype == torch.bfloat16 else 0)
        bound = (2 * wrong + (position + count + 8) * 2**-24) * value.abs().amax() + ROUNDOFF[dtype] * exact.abs()
        wrong = (result.double() - exact[:, :, -count:].transpose(1, 2).flatten(2)).abs()
        assert (wrong <= bound[:, :, -count:].transpose(1, 2).flatten(2)).all()


@dtypes
def test_rows_at_their_own_positions_get_what_each_gets_alone(dtype, kernels):
    dim, count, width = 8, 3, kernels.vector_width()
    keys, values = random(3, 2, -(-40 // width), dim, width, dtype=dtype), random(3, 2, 40, dim, dtype=dtype, seed=1)
    values = F.pad(values, (0, 0, 0, keys.shape[2] * width - 40))
    qkv, positions = random(3, count, 4 + 2 * 2, dim, dtype=dtype, seed=2), torch.tensor([5, 37, 12])
    cos, sin = rotary_tables(40, dim, dtype)
    alone = []
    for row in range(3):
        memory = keys[row : row + 1].clone(), values[row : row + 1].clone()
        place = positions[row : row + 1]
        alone.append((kernels.attend(qkv[row : row + 1], cos, sin, *memory, place, 1.0), *memory))
    together = kernels.attend(qkv, cos, sin, keys, values, positions, 1.0)
    for found, expected in zip((together, keys, values), zip(*alone)):
        assert torch.equal(found, torch.cat(expected))


def test_what_is_not_finite_stays_so(kernels):
    qkv = torch.zeros(1, 1, 3, 16)
    keys, values = torch.zeros(1, 1, 1, 16, kernels.vector_width()), torch.zeros(1, 1, kernels.vector_width(), 16)
    qkv[..., 0, 3] = torch.nan
    assert kernels.attend(qkv, None, None, keys, values, torch.tensor([0]), 1.0).isnan().all()
    hidden = torch.full((1, 16), torch.inf)
    assert kernels.add_norm(hidden, None, torch.ones(16), None, 1e-5)[1].isnan().all()
    assert kernels.silu_mul(torch.full((1, 32), torch.nan)).isnan().all()


def test_without_a_compiler_there_is_a_warning_and_no_kernels(monkeypatch, caplog):
    def load_inline(*args, **kwargs):
        raise RuntimeError("Ninja is required")

    monkeypatch.setattr("torch.utils.cpp_extension.load_inline", load_inline)
    assert module._load.__wrapped__() is None
    assert "Ninja is required" in caplog.text
