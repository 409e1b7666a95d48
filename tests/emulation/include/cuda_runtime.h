#pragma once

// Stands in for CUDA's header of this name: the language and the built-in functions that kernels
// use, for a host compiler.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulation/block.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// --- vector types ---

#define SPECEXTEND_VECTORS(T, name)                                                  \
  struct name##1 { T x; };                                                           \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SPECEXTEND_VECTORS(signed char, char)
SPECEXTEND_VECTORS(unsigned char, uchar)
SPECEXTEND_VECTORS(short, short)
SPECEXTEND_VECTORS(unsigned short, ushort)
SPECEXTEND_VECTORS(int, int)
SPECEXTEND_VECTORS(unsigned, uint)
SPECEXTEND_VECTORS(long long, longlong)
SPECEXTEND_VECTORS(unsigned long long, ulonglong)
SPECEXTEND_VECTORS(float, float)
SPECEXTEND_VECTORS(double, double)
#undef SPECEXTEND_VECTORS

struct int3 {
  int x, y, z;
};
struct float3 {
  float x, y, z;
};

// --- where a thread is ---

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = specextend::emulation::kWarp;

// --- launches ---

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> params;
  } call{kernel, {std::forward<Args>(args)...}};
  return specextend::emulation::run_grid(
      reinterpret_cast<const void*>(kernel), *config,
      [](void* argument) {
        const Call& call = *static_cast<const Call*>(argument);
        std::apply(call.kernel, call.params);
      },
      &call);
}

// --- barriers and fences ---

inline void __syncthreads(SPECEXTEND_SITE) {
  specextend::emulation::barrier("__syncthreads", file, line, 0, 0, true, 0);
}
inline int __syncthreads_count(int predicate, SPECEXTEND_SITE) {
  return specextend::emulation::barrier("__syncthreads_count", file, line, 0, 0, true,
                                        predicate != 0);
}
inline int __syncthreads_or(int predicate, SPECEXTEND_SITE) {
  return specextend::emulation::barrier("__syncthreads_or", file, line, 0, 0, true,
                                        predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate, SPECEXTEND_SITE) {
  return specextend::emulation::barrier("__syncthreads_and", file, line, 0, 0, true,
                                        predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SPECEXTEND_SITE) {
  specextend::emulation::warp_call(
      "__syncwarp", file, line, mask, nullptr,
      [](void* const*, unsigned mask) { specextend::emulation::order_lanes(mask); });
}
inline void __threadfence() { specextend::emulation::thread_fence(); }
inline void __threadfence_system() { specextend::emulation::thread_fence(); }

// --- votes, shuffles, matches and reductions of a warp ---

namespace specextend::emulation {

template <typename T>
struct Exchange {
  T value;
  unsigned source;
  T result;
};

// Every lane gets the value of its source.
template <typename T>
T exchange(const char* name, const char* file, int line, unsigned mask, T value, unsigned source) {
  static_assert(std::is_trivially_copyable_v<T>);
  Exchange<T> own{value, source, value};
  warp_call(name, file, line, mask, &own, [](void* const* operands, unsigned mask) {
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      auto* reader = static_cast<Exchange<T>*>(operands[i]);
      if (!(mask >> reader->source & 1)) {
        fail("lane " + std::to_string(i) + " reads lane " + std::to_string(reader->source) +
             ", which does not take part");
      }
      reader->result = static_cast<Exchange<T>*>(operands[reader->source])->value;
    }
  });
  return own.result;
}

// Every lane gets function(its value, all values, mask); values of lanes without a part are 0.
template <typename T, typename Result>
Result collect(const char* name, const char* file, int line, unsigned mask, T value,
               Result (*function)(T own, const T* values, unsigned mask)) {
  struct Vote {
    T value;
    Result (*function)(T, const T*, unsigned);
    Result result;
  } own{value, function, {}};
  warp_call(name, file, line, mask, &own, [](void* const* operands, unsigned mask) {
    T values[kWarp] = {};
    for (int i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) values[i] = static_cast<Vote*>(operands[i])->value;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      Vote* vote = static_cast<Vote*>(operands[i]);
      vote->result = vote->function(values[i], values, mask);
    }
  });
  return own.result;
}

inline unsigned ballot(const char* name, const char* file, int line, unsigned mask,
                       bool predicate) {
  return collect<bool, unsigned>(name, file, line, mask, predicate,
                                 [](bool, const bool* values, unsigned) {
                                   unsigned bits = 0;
                                   for (int i = 0; i < kWarp; ++i) bits |= unsigned(values[i]) << i;
                                   return bits;
                                 });
}

template <typename T, typename Function>
T reduce(const T* values, unsigned mask, Function function) {
  T result = values[__builtin_ctz(mask)];
  for (int i = __builtin_ctz(mask) + 1; i < kWarp; ++i) {
    if (mask >> i & 1) result = function(result, values[i]);
  }
  return result;
}

}  // namespace specextend::emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, SPECEXTEND_SITE) {
  const unsigned lane = specextend::emulation::lane(), segment = lane & ~unsigned(width - 1);
  return specextend::emulation::exchange("__shfl_sync", file, line, mask, value,
                                         segment | (unsigned(source) & unsigned(width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, SPECEXTEND_SITE) {
  const unsigned lane = specextend::emulation::lane(), source = lane ^ unsigned(lanes);
  const bool inside = source < (lane | unsigned(width - 1)) + 1;
  return specextend::emulation::exchange("__shfl_xor_sync", file, line, mask, value,
                                         inside ? source : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = warpSize, SPECEXTEND_SITE) {
  const unsigned lane = specextend::emulation::lane();
  const bool inside = lanes <= (lane & unsigned(width - 1));
  return specextend::emulation::exchange("__shfl_up_sync", file, line, mask, value,
                                         inside ? lane - lanes : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = warpSize, SPECEXTEND_SITE) {
  const unsigned lane = specextend::emulation::lane();
  const bool inside = (lane & unsigned(width - 1)) + lanes < unsigned(width);
  return specextend::emulation::exchange("__shfl_down_sync", file, line, mask, value,
                                         inside ? lane + lanes : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SPECEXTEND_SITE) {
  return specextend::emulation::ballot("__ballot_sync", file, line, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, SPECEXTEND_SITE) {
  return specextend::emulation::ballot("__any_sync", file, line, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SPECEXTEND_SITE) {
  return specextend::emulation::ballot("__all_sync", file, line, mask, predicate != 0) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, SPECEXTEND_SITE) {
  return specextend::emulation::collect<T, unsigned>("__match_any_sync", file, line, mask, value,
                                                     [](T own, const T* values, unsigned mask) {
                                                       unsigned equal = 0;
                                                       for (int i = 0; i < warpSize; ++i) {
                                                         if ((mask >> i & 1) && values[i] == own)
                                                           equal |= 1u << i;
                                                       }
                                                       return equal;
                                                     });
}

#define SPECEXTEND_REDUCE(T, name, expression)                                                 \
  inline T __reduce_##name##_sync(unsigned mask, T value, SPECEXTEND_SITE) {                   \
    return specextend::emulation::collect<T, T>("__reduce_" #name "_sync", file, line, mask,   \
                                                value, [](T, const T* values, unsigned mask) { \
                                                  return specextend::emulation::reduce(        \
                                                      values, mask,                            \
                                                      [](T a, T b) { return T(expression); }); \
                                                });                                            \
  }
SPECEXTEND_REDUCE(unsigned, add, a + b)
SPECEXTEND_REDUCE(int, add, unsigned(a) + unsigned(b))
SPECEXTEND_REDUCE(unsigned, min, a < b ? a : b)
SPECEXTEND_REDUCE(int, min, a < b ? a : b)
SPECEXTEND_REDUCE(unsigned, max, a > b ? a : b)
SPECEXTEND_REDUCE(int, max, a > b ? a : b)
SPECEXTEND_REDUCE(unsigned, and, a& b)
SPECEXTEND_REDUCE(unsigned, or, a | b)
SPECEXTEND_REDUCE(unsigned, xor, a ^ b)
#undef SPECEXTEND_REDUCE

// --- atomics: blocks and threads take turns, so that only the order matters ---

template <typename T, typename Function>
__attribute__((no_sanitize("thread"))) T specextend_atomic(T* p, Function function) {
  specextend::emulation::yield();
  specextend::emulation::note_atomic(p, sizeof(T));
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) {
    specextend::emulation::fail("an atomic operation on a misaligned address");
  }
  const T before = *p;
  *p = function(before);
  return before;
}

#define SPECEXTEND_ATOMIC(T, name, expression)                                          \
  inline T atomic##name(T* p, T value) {                                                \
    return specextend_atomic(p, [value](T old) { return static_cast<T>(expression); }); \
  }
#define SPECEXTEND_ATOMICS(T)                                                         \
  SPECEXTEND_ATOMIC(T, Exch, (void(old), value))                                      \
  SPECEXTEND_ATOMIC(T, Min, old < value ? old : value)                                \
  SPECEXTEND_ATOMIC(T, Max, old > value ? old : value)                                \
  SPECEXTEND_ATOMIC(T, And, old& value)                                               \
  SPECEXTEND_ATOMIC(T, Or, old | value)                                               \
  SPECEXTEND_ATOMIC(T, Xor, old ^ value)                                              \
  inline T atomicCAS(T* p, T compare, T value) {                                      \
    return specextend_atomic(p, [=](T old) { return old == compare ? value : old; }); \
  }
SPECEXTEND_ATOMICS(int)
SPECEXTEND_ATOMICS(unsigned)
SPECEXTEND_ATOMICS(long long)
SPECEXTEND_ATOMICS(unsigned long long)
SPECEXTEND_ATOMIC(int, Add, unsigned(old) + unsigned(value))
SPECEXTEND_ATOMIC(unsigned, Add, old + value)
SPECEXTEND_ATOMIC(unsigned long long, Add, old + value)
SPECEXTEND_ATOMIC(float, Add, old + value)
SPECEXTEND_ATOMIC(double, Add, old + value)
SPECEXTEND_ATOMIC(float, Exch, (void(old), value))
SPECEXTEND_ATOMIC(int, Sub, unsigned(old) - unsigned(value))
SPECEXTEND_ATOMIC(unsigned, Sub, old - value)
SPECEXTEND_ATOMIC(unsigned, Inc, old >= value ? 0 : old + 1)
SPECEXTEND_ATOMIC(unsigned, Dec, old == 0 || old > value ? value : old - 1)
#undef SPECEXTEND_ATOMICS
#undef SPECEXTEND_ATOMIC

// --- loads and stores with hints ---

template <typename T>
T specextend_load(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) {
    specextend::emulation::fail("a load of " + std::to_string(sizeof(T)) +
                                " bytes from a misaligned address");
  }
  return *p;
}
template <typename T>
void specextend_store(T* p, const T& value) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) {
    specextend::emulation::fail("a store of " + std::to_string(sizeof(T)) +
                                " bytes to a misaligned address");
  }
  *p = value;
}
template <typename T>
T __ldg(const T* p) {
  return specextend_load(p);
}
template <typename T>
T __ldca(const T* p) {
  return specextend_load(p);
}
template <typename T>
T __ldcg(const T* p) {
  return specextend_load(p);
}
template <typename T>
T __ldcs(const T* p) {
  return specextend_load(p);
}
template <typename T>
T __ldlu(const T* p) {
  return specextend_load(p);
}
template <typename T>
T __ldcv(const T* p) {
  return specextend_load(p);
}
template <typename T>
void __stwb(T* p, const T& value) {
  specextend_store(p, value);
}
template <typename T>
void __stcg(T* p, const T& value) {
  specextend_store(p, value);
}
template <typename T>
void __stcs(T* p, const T& value) {
  specextend_store(p, value);
}
template <typename T>
void __stwt(T* p, const T& value) {
  specextend_store(p, value);
}

// --- bits ---

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned long long __brevll(unsigned long long x) {
  return static_cast<unsigned long long>(__brev(unsigned(x))) << 32 | __brev(unsigned(x >> 32));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selectors) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = selectors >> 4 * i;
    unsigned byte = unsigned(bytes >> 8 * (selector & 7)) & 0xff;
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}

template <typename To, typename From>
To specextend_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline int __float_as_int(float x) { return specextend_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return specextend_bits<unsigned>(x); }
inline float __int_as_float(int x) { return specextend_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return specextend_bits<float>(x); }
inline long long __double_as_longlong(double x) { return specextend_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return specextend_bits<double>(x); }

// --- arithmetic ---

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline int __float2int_rn(float x) { return int(lrintf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline int __float2int_rd(float x) { return int(floorf(x)); }
inline int __float2int_ru(float x) { return int(ceilf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }

[[noreturn]] inline void __trap() { specextend::emulation::fail("__trap"); }
