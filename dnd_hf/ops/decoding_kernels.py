"""C++ for the blocks of a decoding step: norms of sums, attention, gated activation, and the packed products between.

PyTorch's own operations for few rows take longer to start than to compute, and so do calls from Python. The kernels
round where a layer's results are stored, and compute in float32 between. They are compiled by the C++ compiler of the
machine, once, by PyTorch's loader, which keeps them in its folder of extensions (`TORCH_EXTENSIONS_DIR`).
"""

import logging
from functools import cache
from threading import Lock
from typing import Any

import torch


logger = logging.getLogger(__name__)

KERNELS = r"""
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace {
using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size();

int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

inline Vec load(const float* p) { return Vec::loadu(p); }
inline Vec load(const at::BFloat16* p) {
  Vec out;
  at::vec::load_fp32_from_bf16(p, out);
  return out;
}

template <typename T>
void read(const T* from, float* to, int64_t n) { at::vec::convert(from, to, n); }
template <typename T>
void write(const float* from, T* to, int64_t n) { at::vec::convert(from, to, n); }

template <typename F>
float reduce_sum(const float* x, int64_t n, F f) {
  Vec sum(0.f);
  int64_t i = 0;
  for (; i + W <= n; i += W) sum = sum + f(Vec::loadu(x + i));
  float lanes[W], rest[W] = {}, total = 0;
  if (i < n) {  // lanes that are not filled hold what f makes of zero: taken out again
    Vec tail = f(Vec::loadu(x + i, n - i));
    tail.store(rest);
    for (int64_t j = 0; j < n - i; j++) total += rest[j];
  }
  sum.store(lanes);
  for (float lane : lanes) total += lane;
  return total;
}

// hidden + branch (None: hidden as it is), and the norm of that: RMS norm, or layer norm where it has a bias.
template <typename T>
void add_norm_rows(const T* hidden, const T* branch, const T* weight, const T* bias, T* sum, T* out, int64_t rows,
                   int64_t width, float eps) {
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> x(padded(width)), y(padded(width)), w(padded(width)), b(padded(width));
    read(weight, w.data(), width);
    if (bias) read(bias, b.data(), width);
    for (int64_t row = begin; row < end; row++) {
      read(hidden + row * width, x.data(), width);
      if (branch) {
        read(branch + row * width, y.data(), width);
        for (int64_t i = 0; i < width; i += W) (Vec::loadu(&x[i]) + Vec::loadu(&y[i])).store(&x[i]);
        write(x.data(), sum + row * width, width);
        read(sum + row * width, x.data(), width);  // what later layers see
      }
      float mean = bias ? reduce_sum(x.data(), width, [](Vec v) { return v; }) / width : 0.f;
      float square = reduce_sum(x.data(), width, [&](Vec v) { return (v - Vec(mean)) * (v - Vec(mean)); }) / width;
      Vec scale(1.f / std::sqrt(square + eps)), offset(mean);
      for (int64_t i = 0; i < width; i += W)
        ((Vec::loadu(&x[i]) - offset) * scale * Vec::loadu(&w[i]) + Vec::loadu(&b[i])).store(&x[i]);
      write(x.data(), out + row * width, width);
    }
  });
}

std::tuple<Tensor, Tensor> add_norm(const Tensor& hidden, const std::optional<Tensor>& branch, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double eps) {
  int64_t width = hidden.size(-1);
  TORCH_CHECK(hidden.is_contiguous() && weight.is_contiguous() && weight.numel() == width, "add_norm: layout");
  TORCH_CHECK(weight.scalar_type() == hidden.scalar_type(), "add_norm: precision");
  if (branch) TORCH_CHECK(branch->is_contiguous() && branch->sizes() == hidden.sizes(), "add_norm: branch");
  if (bias) TORCH_CHECK(bias->is_contiguous() && bias->numel() == width, "add_norm: bias");
  Tensor out = at::empty_like(hidden), sum = branch ? at::empty_like(hidden) : hidden;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    add_norm_rows<T>(hidden.const_data_ptr<T>(), branch ? branch->const_data_ptr<T>() : nullptr,
                     weight.const_data_ptr<T>(), bias ? bias->const_data_ptr<T>() : nullptr,
                     branch ? sum.data_ptr<T>() : nullptr, out.data_ptr<T>(), hidden.numel() / width, width, eps);
  };
  if (hidden.scalar_type() == at::kBFloat16) run(at::BFloat16()); else run(0.f);
  return {sum, out};
}

// silu(gate) * up, from [gate, up] side by side.
Tensor silu_mul(const Tensor& gate_up) {
  int64_t width = gate_up.size(-1) / 2, rows = gate_up.numel() / (2 * width);
  TORCH_CHECK(gate_up.is_contiguous(), "silu_mul: layout");
  auto sizes = gate_up.sizes().vec();
  sizes.back() = width;
  Tensor out = at::empty(sizes, gate_up.options());
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* from = gate_up.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> gate(padded(width)), up(padded(width));
      for (int64_t row = begin; row < end; row++) {
        read(from + 2 * row * width, gate.data(), width);
        read(from + (2 * row + 1) * width, up.data(), width);
        for (int64_t i = 0; i < width; i += W) {
          Vec g = Vec::loadu(&gate[i]);
          (g / (Vec(1.f) + g.neg().exp()) * Vec::loadu(&up[i])).store(&gate[i]);
        }
        write(gate.data(), to + row * width, width);
      }
    });
  };
  if (gate_up.scalar_type() == at::kBFloat16) run(at::BFloat16()); else run(0.f);
  return out;
}

// One head of one sequence. Keys lie in blocks of W positions, each (dim, W), so that W scores are one vector.
template <typename T>
void attend_head(const float* query, const T* keys, const T* values, float* scores, float* out, int64_t positions,
                 int64_t dim) {
  Vec largest(-std::numeric_limits<float>::infinity());
  for (int64_t start = 0; start < positions; start += W) {
    const T* block = keys + start * dim;
    Vec even(0.f), odd(0.f);
    int64_t d = 0;
    for (; d + 2 <= dim; d += 2) {
      even = at::vec::fmadd(Vec(query[d]), load(block + d * W), even);
      odd = at::vec::fmadd(Vec(query[d + 1]), load(block + (d + 1) * W), odd);
    }
    if (d < dim) even = at::vec::fmadd(Vec(query[d]), load(block + d * W), even);
    (even + odd).store(scores + start);
  }
  for (int64_t i = positions; i < padded(positions); i++) scores[i] = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < positions; i += W) largest = at::vec::maximum(largest, Vec::loadu(scores + i));
  float lanes[W], most = -std::numeric_limits<float>::infinity(), total = 0;
  largest.store(lanes);
  for (float lane : lanes) most = (lane > most || std::isnan(lane)) ? lane : most;
  Vec sum(0.f);
  for (int64_t i = 0; i < positions; i += W) {
    Vec weight = (Vec::loadu(scores + i) - Vec(most)).exp();
    weight.store(scores + i);
    sum = sum + weight;
  }
  sum.store(lanes);
  for (float lane : lanes) total += lane;
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) {
    Vec a(0.f), b(0.f), c(0.f), e(0.f);
    for (int64_t p = 0; p < positions; p++) {
      Vec weight(scores[p]);
      const T* value = values + p * dim + d;
      a = at::vec::fmadd(weight, load(value), a);
      b = at::vec::fmadd(weight, load(value + W), b);
      c = at::vec::fmadd(weight, load(value + 2 * W), c);
      e = at::vec::fmadd(weight, load(value + 3 * W), e);
    }
    Vec scale(1.f / total);
    (a * scale).store(out + d);
    (b * scale).store(out + d + W);
    (c * scale).store(out + d + 2 * W);
    (e * scale).store(out + d + 3 * W);
  }
  for (; d < dim; d++) {
    float one = 0;
    for (int64_t p = 0; p < positions; p++) one += scores[p] * static_cast<float>(values[p * dim + d]);
    out[d] = one / total;
  }
}

// x * cos + rotate_half(x) * sin; the sine of the first half has the sign of the rotation.
template <typename T>
void turn(const T* from, const T* cos, const T* sin, float scale, float* to, int64_t dim) {
  int64_t half = dim / 2;
  for (int64_t d = 0; d < dim; d++) {
    float x = from[d];
    if (cos) x = x * static_cast<float>(cos[d]) + static_cast<float>(from[d < half ? d + half : d - half]) * sin[d];
    to[d] = x * scale;
  }
}

// Causal attention of tokens (rows, count, heads + 2 * kv_heads, dim); writes their keys and values. The first token of
// each row is at `positions`, (rows,) or (1,) for all of them; cosines and sines are those of all positions.
Tensor attend(const Tensor& qkv, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
              const Tensor& keys, const Tensor& values, const Tensor& positions, double scaling) {
  TORCH_CHECK(qkv.dim() == 4 && qkv.is_contiguous(), "attend: layout");
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous(), "attend: layout of the cache");
  int64_t rows = qkv.size(0), count = qkv.size(1), dim = qkv.size(3);
  int64_t kv_heads = values.size(1), room = values.size(2), heads = qkv.size(2) - 2 * kv_heads;
  TORCH_CHECK(positions.is_contiguous() && positions.scalar_type() == at::kLong, "attend: positions");
  TORCH_CHECK(positions.numel() == 1 || positions.numel() == rows, "attend: number of positions");
  const int64_t *first = positions.const_data_ptr<int64_t>(), step = positions.numel() > 1;
  int64_t last = *std::max_element(first, first + positions.numel()) + count;
  TORCH_CHECK(rows <= values.size(0) && last <= room && room % W == 0, "attend: room");
  TORCH_CHECK(keys.sizes() == at::IntArrayRef({values.size(0), kv_heads, room / W, dim, W}), "attend: keys");
  TORCH_CHECK(keys.scalar_type() == qkv.scalar_type(), "attend: precision of keys");
  TORCH_CHECK(values.scalar_type() == qkv.scalar_type(), "attend: precision of values");
  if (cos) TORCH_CHECK(cos->is_contiguous() && sin->is_contiguous() && cos->numel() >= last * dim, "attend: rotary");
  Tensor out = at::empty({rows, count, heads * dim}, qkv.options());
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const T *from = qkv.const_data_ptr<T>(), *cosines = cos ? cos->const_data_ptr<T>() : nullptr;
    const T* sines = cos ? sin->const_data_ptr<T>() : nullptr;
    T *k = keys.data_ptr<T>(), *v = values.data_ptr<T>(), *to = out.data_ptr<T>();
    int64_t group = heads / kv_heads, width = (heads + 2 * kv_heads) * dim;
    at::parallel_for(0, rows * kv_heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> one(dim), scores(padded(room)), result(dim);
      for (int64_t i = begin; i < end; i++) {
        int64_t row = i / kv_heads, kv = i % kv_heads, position = first[row * step];
        T *own_keys = k + i * room * dim, *own_values = v + i * room * dim;
        auto token = [&](int64_t t, int64_t head) { return from + (row * count + t) * width + head * dim; };
        auto table = [&](const T* values, int64_t t) { return values ? values + (position + t) * dim : nullptr; };
        for (int64_t t = 0; t < count; t++) {
          int64_t at = position + t;
          turn(token(t, heads + kv), table(cosines, t), table(sines, t), 1.f, one.data(), dim);
          T* column = own_keys + at / W * W * dim + at % W;
          for (int64_t d = 0; d < dim; d++) column[d * W] = static_cast<T>(one[d]);
          const T* value = token(t, heads + kv_heads + kv);
          std::copy(value, value + dim, own_values + at * dim);
        }
        for (int64_t t = 0; t < count; t++) {
          for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
            turn(token(t, head), table(cosines, t), table(sines, t), scaling, one.data(), dim);
            attend_head(one.data(), own_keys, own_values, scores.data(), result.data(), position + t + 1, dim);
            write(result.data(), to + (row * count + t) * heads * dim + head * dim, dim);
          }
        }
      }
    });
  };
  if (qkv.scalar_type() == at::kBFloat16) run(at::BFloat16()); else run(0.f);
  return out;
}

// inputs @ weight.T + bias, of a weight in oneDNN's layout or as it is.
Tensor product(const Tensor& inputs, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (!weight.is_mkldnn()) return at::linear(inputs, weight, bias);
  using Scalars = c10::List<std::optional<at::Scalar>>;
  using Pointwise = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view, Scalars,
                           std::optional<std::string_view>);
  static const auto linear =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Pointwise>();
  return linear.call(inputs, weight, bias, "none", Scalars(), "");
}

// The attention of a block, from its norm to its last product; not yet added to the hidden states.
Tensor attention_branch(const Tensor& hidden, const Tensor& norm, const std::optional<Tensor>& norm_bias, double eps,
                        const Tensor& qkv, const std::optional<Tensor>& qkv_bias, const Tensor& out,
                        const std::optional<Tensor>& out_bias, const std::optional<Tensor>& cos,
                        const std::optional<Tensor>& sin, const Tensor& keys, const Tensor& values,
                        const Tensor& positions, double scaling) {
  Tensor normed = std::get<1>(add_norm(hidden, std::nullopt, norm, norm_bias, eps));
  Tensor tokens = product(normed, qkv, qkv_bias).view({hidden.size(0), hidden.size(1), -1, values.size(3)});
  return product(attend(tokens, cos, sin, keys, values, positions, scaling), out, out_bias);
}

// The rest of a block with a gate of silu.
Tensor add_gated_mlp(const Tensor& hidden, const Tensor& branch, const Tensor& norm,
                     const std::optional<Tensor>& norm_bias, double eps, const Tensor& gate_up,
                     const std::optional<Tensor>& gate_up_bias, const Tensor& down,
                     const std::optional<Tensor>& down_bias) {
  auto [sum, normed] = add_norm(hidden, branch, norm, norm_bias, eps);
  return product(silu_mul(product(normed, gate_up, gate_up_bias)), down, down_bias).add_(sum);
}

int64_t vector_width() { return W; }
}  // namespace

TORCH_LIBRARY(dnd_hf_decoding, m) {
  m.def("add_norm(Tensor hidden, Tensor? branch, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)");
  m.def("silu_mul(Tensor gate_up) -> Tensor");
  m.def("attend(Tensor qkv, Tensor? cos, Tensor? sin, Tensor(a!) keys, Tensor(b!) values, Tensor positions,"
        " float scaling) -> Tensor");
  m.def("attention_branch(Tensor hidden, Tensor norm, Tensor? norm_bias, float eps, Tensor qkv, Tensor? qkv_bias,"
        " Tensor out, Tensor? out_bias, Tensor? cos, Tensor? sin, Tensor(a!) keys, Tensor(b!) values, Tensor positions,"
        " float scaling) -> Tensor");
  m.def("add_gated_mlp(Tensor hidden, Tensor branch, Tensor norm, Tensor? norm_bias, float eps, Tensor gate_up,"
        " Tensor? gate_up_bias, Tensor down, Tensor? down_bias) -> Tensor");
  m.def("vector_width() -> int", &vector_width);
}
TORCH_LIBRARY_IMPL(dnd_hf_decoding, CPU, m) {
  m.impl("add_norm", &add_norm);
  m.impl("silu_mul", &silu_mul);
  m.impl("attend", &attend);
  m.impl("attention_branch", &attention_branch);
  m.impl("add_gated_mlp", &add_gated_mlp);
}
TORCH_LIBRARY_IMPL(dnd_hf_decoding, MkldnnCPU, m) {  // where a weight is in oneDNN's layout
  m.impl("attention_branch", &attention_branch);
  m.impl("add_gated_mlp", &add_gated_mlp);
}
"""

LOADING = Lock()


def decoding_kernels() -> Any | None:
    """`torch.ops.dnd_hf_decoding`, compiled where it is not there yet; None, with a warning, where that fails."""
    with LOADING:
        return _load()


@cache
def _load() -> Any | None:
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch.utils.cpp_extension import load_inline

    try:
        isa = pick_vec_isa()
        flags = ["-O3", "-fno-math-errno", "-fopenmp", *isa.build_arch_flags().split()]
        flags += [f"-D{macro}" for macro in isa.build_macro()]
        load_inline("dnd_hf_decoding", KERNELS, extra_cflags=flags, is_python_module=False, no_implicit_headers=True)
    except Exception as error:
        logger.warning("Decoding runs without compiled kernels, which could not be built: %s", error)
        return None
    return torch.ops.dnd_hf_decoding
