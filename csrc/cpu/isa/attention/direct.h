#pragma once

// How a full block of keys is multiplied without packing it first: where few rows read it once,
// packing does not pay. Each instruction set brings a Direct<Math, T> in a file of its own:
//
//   kRows                        the most rows that it takes
//   takes(rows, dim)             whether it serves so many rows of keys or values of this size
//   logits(p, k, room, ahead)    C [rows, kBlock] = scale * A k^T. A's rows are contiguous; `room`
//                                holds kBlock keys
//   values(p, v, ahead)          C [rows, dim] = A v, plus rescale * C if that is given. C's rows
//                                are contiguous
//
// Its sums take the keys in the order of multiply (product.h), so a row's bits are the same by
// both.

#if defined(__AVX512F__)
#include "cpu/isa/attention/direct_avx512.h"
#elif defined(__AVX2__)
#include "cpu/isa/attention/direct_avx2.h"
#else
#include "cpu/isa/attention/direct_none.h"
#endif
