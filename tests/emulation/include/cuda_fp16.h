#pragma once

// Stands in for CUDA's header of this name: conversions and the pair type, no arithmetic.

#include <cuda_runtime.h>

struct alignas(2) __half {
  uint16_t bits;

  __half() = default;
  __half(float x) : bits(round(x)) {}
  __half(double x) : __half(float(x)) {}
  __half(int x) : __half(float(x)) {}
  operator float() const {
    // The exponent's offset by a product, which makes subnormal numbers right, too.
    const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
    uint32_t result = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
    if ((bits & 0x7c00) == 0x7c00) result |= 0x7f800000;
    return __uint_as_float(result | uint32_t(bits & 0x8000) << 16);
  }

 private:
  static uint16_t round(float x) {
    uint32_t magnitude = __float_as_uint(x) & 0x7fffffff;
    const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x47800000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000) {  // subnormal: units in the last place of 0.5 are 2^-24
      const float sum = __uint_as_float(magnitude) + 0.5f;
      return uint16_t(sign | (__float_as_uint(sum) - __float_as_uint(0.5f)));
    }
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return uint16_t(sign | (magnitude - 0x38000000) >> 13);
  }
};

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}
