#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/cpu.h"
#include "tree.h"

namespace specextend::cpu {
namespace {

template <typename T>
void run_row(const TreeAttentionParams& p, int b, int m, int h) {
  const int n = p.num_tree_keys, d = p.head_dim;
  const int64_t prefix = std::clamp<int64_t>(p.prefix_lens[b], 0, p.capacity - n), keys = prefix + n;
  const int kvh = h / (p.num_heads / p.num_kv_heads);
  const int64_t row = (int64_t(b) * p.num_rows + m) * p.num_heads + h;
  const T* q = static_cast<const T*>(p.q) + b * p.q_stride_b + m * p.q_stride_m + h * p.q_stride_h;
  const T* k = static_cast<const T*>(p.k) + b * p.k_stride_b + kvh * p.k_stride_h;
  const T* v = static_cast<const T*>(p.v) + b * p.v_stride_b + kvh * p.v_stride_h;
  const uint64_t* mask =
      p.mask ? p.mask + (int64_t(b) * p.num_rows + m) * mask_words(n) : nullptr;
  const int64_t q_pos =
      prefix + (p.q_depths ? p.q_depths[int64_t(b) * p.num_rows + m] : m + n - p.num_rows);
  thread_local std::vector<float> s, qf, o;
  s.assign(keys, -INFINITY), qf.resize(d), o.assign(d, 0.f);
  for (int i = 0; i < d; ++i) qf[i] = float(q[i]);
  for (int64_t j = 0; j < keys; ++j) {
    const int t = int(j - prefix);
    if (t >= 0 && !(mask ? mask_bit(mask, t) : chain_bit(m, t, p.num_rows, n))) continue;
    if (p.window) {
      const int64_t pos = t >= 0 && p.k_depths ? prefix + p.k_depths[int64_t(b) * n + t] : j;
      if (pos <= q_pos - p.window) continue;
    }
    float lanes[8] = {};
    for (int i = 0; i < d; i += 8)
      for (int l = 0; l < 8; ++l) lanes[l] += qf[i + l] * float(k[j * p.k_stride_s + i + l]);
    float x = 0;
    for (float lane : lanes) x += lane;
    x *= p.scale;
    s[j] = p.softcap > 0 ? p.softcap * std::tanh(x / p.softcap) : x;
  }
  const float top = keys ? *std::max_element(s.begin(), s.end()) : -INFINITY;
  float sum = 0;
  for (int64_t j = 0; j < keys; ++j) {
    if (s[j] == -INFINITY) continue;
    const float w = std::exp(s[j] - top);
    sum += w;
    for (int i = 0; i < d; ++i) o[i] += w * float(v[j * p.v_stride_s + i]);
  }
  const float lse = sum > 0 ? top + std::log(sum) : -INFINITY;
  const float gate = p.sinks ? 1 / (1 + std::exp(p.sinks[h] - lse)) : 1.f;
  T* out = static_cast<T*>(p.out) + row * d;
  for (int i = 0; i < d; ++i) out[i] = T(sum > 0 ? o[i] / sum * gate : 0.f);
  p.lse[row] = lse;
  for (int c = 0; c < p.num_chunks; ++c) {
    const int64_t begin = int64_t(c) * p.chunk_size, end = std::min(begin + p.chunk_size, prefix);
    float most = -INFINITY, total = 0;
    for (int64_t j = begin; j < end; ++j) most = std::max(most, s[j]);
    for (int64_t j = begin; j < end; ++j)
      if (s[j] != -INFINITY) total += std::exp(s[j] - most);
    p.chunk_lse[row * p.num_chunks + c] = total > 0 ? most + std::log(total) : -INFINITY;
  }
}

template <typename T>
void run(const TreeAttentionParams& p) {
  torch::stable::parallel_for(
      0, int64_t(p.batch) * p.num_rows * p.num_heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int h = i % p.num_heads, m = i / p.num_heads % p.num_rows;
          run_row<T>(p, int(i / p.num_heads / p.num_rows), m, h);
        }
      });
}

}  // namespace

void tree_attention(const TreeAttentionParams& p, DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return run<float>(p);
    case DType::kFloat16: return run<c10::Half>(p);
    case DType::kBFloat16: return run<c10::BFloat16>(p);
  }
}

}  // namespace specextend::cpu
