#pragma once

// The argument checks that all ops share. A failed check names the op, the argument, what was
// wanted and what was got, before anything is allocated or written.

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace specextend {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline std::string dtype_string(ScalarType type) {
  std::string name = torch::headeronly::toString(type);
  if (name == "Float") return "float32";
  if (name == "Double") return "float64";
  if (name == "Half") return "float16";
  if (name == "BFloat16") return "bfloat16";
  if (name == "Int") return "int32";
  if (name == "Long") return "int64";
  if (name == "Bool") return "bool";
  return name;
}

inline std::string device_string(const Tensor& t) {
  return t.is_cpu()    ? "cpu"
         : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index())
                       : "another device";
}

inline void check_shape(const char* op, const char* name, const Tensor& t,
                        std::initializer_list<int64_t> want) {
  bool ok = t.dim() == int64_t(want.size());
  if (ok) {
    int64_t i = 0;
    for (int64_t n : want) ok = ok && t.size(i++) == n;
  }
  if (ok) return;
  std::string w;
  for (int64_t n : want) w += (w.empty() ? "" : ", ") + std::to_string(n);
  STD_TORCH_CHECK(false, op, ": ", name, " must have shape [", w, "], got ", shape_string(t));
}

// `letters` names the dimensions, for instance "[B, M, Hq, D]".
inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim,
                      const char* letters) {
  STD_TORCH_CHECK(t.dim() == dim, op, ": ", name, " must be ", letters, ", got ", shape_string(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType want) {
  STD_TORCH_CHECK(t.scalar_type() == want, op, ": ", name, " must be ", dtype_string(want),
                  ", got ", dtype_string(t.scalar_type()));
}

inline void check_float(const char* op, const char* name, const Tensor& t) {
  const ScalarType s = t.scalar_type();
  STD_TORCH_CHECK(s == ScalarType::Float || s == ScalarType::Half || s == ScalarType::BFloat16, op,
                  ": ", name, " must be float32, float16 or bfloat16, got ", dtype_string(s));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t,
                              const char* other_name, const Tensor& other) {
  STD_TORCH_CHECK(t.is_cpu() == other.is_cpu() && t.is_cuda() == other.is_cuda() &&
                      (t.is_cpu() || t.get_device_index() == other.get_device_index()),
                  op, ": ", name, " must be on the device of ", other_name, " (",
                  device_string(other), "), got ", device_string(t));
}

inline void check_unit_last_stride(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() > 0 && (t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1), op, ": ",
                  name, " must have a last stride of 1, got ",
                  t.dim() > 0 ? t.stride(t.dim() - 1) : 0);
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_range(const char* op, const char* name, int64_t value, int64_t low,
                        int64_t high) {
  STD_TORCH_CHECK(low <= value && value <= high, op, ": ", name, " must be in [", low, ", ", high,
                  "], got ", value);
}

// Checks the size of a head in attention. `of` says whose heads they are.
inline void check_head_dim(const char* op, const char* of, int64_t dim, int64_t most) {
  STD_TORCH_CHECK(dim >= 8 && dim <= most && dim % 8 == 0, op, ": the head dimension of ", of,
                  " must be a multiple of 8 in [8, ", most, "], got ", dim);
}

}  // namespace specextend
