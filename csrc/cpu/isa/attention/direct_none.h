#pragma once

// Without vector instructions that are known, all keys are packed.

#include "cpu/isa/attention/product.h"

namespace specextend::cpu {
namespace {
namespace attention {

template <typename Math, typename T>
struct Direct {
  static constexpr int kRows = 0;
  static bool takes(int /*rows*/, int /*dim*/) { return false; }
  static void logits(const Product&, const CacheRows<T>&, float*, Prefetcher*) {}
  static void values(const Product&, const CacheRows<T>&, Prefetcher*) {}
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
