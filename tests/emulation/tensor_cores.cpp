// Does ldmatrix and mma: the last lane of a warp to come does them for all.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulation/block.h"
#include "races.h"

namespace specextend::emulation {
namespace {

struct Ldmatrix {
  const void* row;
  uint32_t* r;  // [4]
};

template <bool kTransposed>
void move_matrices(void* const* operands, unsigned) {
  for (int t = 0; t < kWarp; ++t) {
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int row = kTransposed ? 2 * (t % 4) + j : t / 4;
        const int column = kTransposed ? t / 4 : 2 * (t % 4) + j;
        pair[j] = static_cast<const uint16_t*>(
            static_cast<const Ldmatrix*>(operands[8 * i + row])->row)[column];
      }
      static_cast<Ldmatrix*>(operands[t])->r[i] = pair[0] | uint32_t(pair[1]) << 16;
    }
  }
}

struct Mma {
  float* d;           // [4]
  const uint32_t* a;  // [4]
  uint32_t b[2];
};

template <typename T>
float element(uint32_t pair, int which) {
  return float(specextend_bits<T>(uint16_t(pair >> 16 * which)));
}

template <typename T>
void multiply(void* const* operands, unsigned) {
  float a[16][16], b[16][8];  // [m][k], [k][n]
  for (int t = 0; t < kWarp; ++t) {
    const Mma& own = *static_cast<const Mma*>(operands[t]);
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 2; ++j) {
        a[t / 4 + 8 * (i % 2)][2 * (t % 4) + 8 * (i / 2) + j] = element<T>(own.a[i], j);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) b[2 * (t % 4) + 8 * i + j][t / 4] = element<T>(own.b[i], j);
    }
  }
  float d[16][8] = {};
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int t = 0; t < kWarp; ++t) {
    float* own = static_cast<const Mma*>(operands[t])->d;
    for (int i = 0; i < 4; ++i) own[i] += d[t / 4 + 8 * (i / 2)][2 * (t % 4) + i % 2];
  }
}

}  // namespace

void ldmatrix(uint32_t* r, const void* row, bool transposed, const char* file, int line) {
  check_shared("ldmatrix", row, 16);
  note_read(row, 16);
  Ldmatrix own{row, r};
  warp_call("ldmatrix", file, line, 0xffffffffu, &own,
            transposed ? move_matrices<true> : move_matrices<false>);
}

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat16, const char* file,
         int line) {
  Mma own{d, a, {b0, b1}};
  warp_call("mma", file, line, 0xffffffffu, &own,
            bfloat16 ? multiply<__nv_bfloat16> : multiply<__half>);
}

}  // namespace specextend::emulation
