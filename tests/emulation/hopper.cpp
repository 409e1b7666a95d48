// Does what Hopper alone does: products of a warpgroup, maps of tensors, copies of boxes. Products
// read their operands, and write their results, at a time that the schedule draws between the call
// and the end of the wait for them.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#include "emulation/block.h"
#include "hopper_tiles.h"
#include "races.h"
#include "run.h"

namespace specextend::emulation {
namespace {

struct Operand {
  const void* p;
  size_t bytes;
};

struct Product {
  std::function<void()> run;
  std::vector<Operand> operands;  // they lie in shared memory
  bool done;
};

// Hold each thread's products that it has not waited for, and its registers that others' read.
std::deque<Product> products[kMaxThreads];
const void* registers[kMaxThreads];

void meet_warp(const char* name, const char* file, int line) {
  warp_call(name, file, line, 0xffffffffu, nullptr, [](void* const*, unsigned) {});
}

// Notes the reads of operands; each lane looks after its part.
void note_operands(const Product& product) {
  for (const Operand& o : product.operands) {
    for (size_t at = lane() * 16; at < o.bytes; at += kWarp * 16) {
      note_engine_read(static_cast<const char*>(o.p) + at, 16);
    }
  }
}

void begin_product(std::function<void()> run, std::vector<Operand> operands) {
  auto& queue = products[thread()];
  queue.push_back({std::move(run), std::move(operands), false});
  note_operands(queue.back());
  for (Product& p : queue) {
    if (p.done) continue;
    if (draw(2) == 0) break;
    p.run();
    p.done = true;
  }
}

template <typename T>
void multiply_queries(float* s, const T* q, const T* k, int keys, int dim, int thread) {
  for (int i = 0; i < keys / 2; ++i) {
    const int row = fragment_row(thread, i), key = fragment_column(thread, i);
    float sum = 0.f;
    for (int d = 0; d < dim; ++d) {
      sum += float(q[shared_index(64, row, d)]) * float(k[shared_index(keys, key, d)]);
    }
    s[i] = sum;
  }
}

// The weights of a row are in the registers of the four threads that hold it.
template <typename T>
void multiply_values(float* o, const T* v, int keys, int dim, int thread, int quad) {
  std::vector<float> weights[2] = {std::vector<float>(size_t(keys)),
                                   std::vector<float>(size_t(keys))};
  for (int t = 0; t < 4; ++t) {
    const T* elements = static_cast<const T*>(registers[quad + t]);
    for (int i = 0; i < keys / 2; ++i) {
      weights[i / 2 % 2][size_t(fragment_column(t, i))] = float(elements[i]);
    }
  }
  for (int i = 0; i < dim / 2; ++i) {
    const int column = fragment_column(thread, i);
    for (int key = 0; key < keys; ++key) {
      o[i] += weights[i / 2 % 2][size_t(key)] * float(v[shared_index(keys, key, column)]);
    }
  }
}

// --- maps hold what was asked for, in the place of the driver's own form ---

struct Map {
  const char* data;
  uint64_t sizes[4], strides[4];  // columns, rows, heads, batch; in bytes
  uint32_t box_rows;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

}  // namespace

void forget_products(int threads) {
  for (int i = 0; i < threads; ++i) products[i].clear();
}

void multiply_queries(float* s, const void* q, const void* k, int keys, int dim, bool bfloat16,
                      const char* file, int line) {
  meet_warp("wgmma", file, line);
  std::fill(s, s + keys / 2, NAN);
  const int t = int(threadIdx.x) % 128;
  const std::vector<Operand> operands = {{q, size_t(64 * dim * 2)}, {k, size_t(keys * dim * 2)}};
  const auto run = [=](auto type) {
    using T = decltype(type);
    multiply_queries(s, static_cast<const T*>(q), static_cast<const T*>(k), keys, dim, t);
  };
  begin_product([=] { bfloat16 ? run(__nv_bfloat16{}) : run(__half{}); }, operands);
}

void multiply_values(float* o, const void* p, const void* v, int keys, int dim, bool bfloat16,
                     const char* file, int line) {
  registers[thread()] = p;
  meet_warp("wgmma", file, line);
  const int t = int(threadIdx.x) % 128, quad = thread() / 4 * 4;
  const auto run = [=](auto type) {
    multiply_values(o, static_cast<const decltype(type)*>(v), keys, dim, t, quad);
  };
  begin_product([=] { bfloat16 ? run(__nv_bfloat16{}) : run(__half{}); },
                {{v, size_t(keys * dim * 2)}});
}

void wait_products(int pending, const char* file, int line) {
  meet_warp("wgmma.wait", file, line);
  auto& queue = products[thread()];
  for (; queue.size() > size_t(pending); queue.pop_front()) {
    if (!queue.front().done) queue.front().run();
    note_operands(queue.front());
  }
  meet_warp("wgmma.wait", file, line);
}

void copy_box(void* shared, const CUtensorMap& map, uint64_t* barrier, const int (&at)[4]) {
  // The box is laid out as it will lie in shared memory. The newest ones are kept: that many are
  // never under way.
  static std::deque<std::vector<uint16_t>> images(256);
  Map m;
  memcpy(&m, &map, sizeof(m));
  images.pop_front();
  const int rows = int(m.box_rows);
  std::vector<uint16_t>& image = images.emplace_back(size_t(rows) * 64);
  const auto [column, row, head, batch] = at;
  const char* const data = m.data + uint64_t(head) * m.strides[2] + uint64_t(batch) * m.strides[3];
  const int columns = std::min(64, int(m.sizes[0]) - column);
  for (int r = 0; r < rows && uint64_t(row + r) < m.sizes[1]; ++r) {
    const char* const from = data + uint64_t(row + r) * m.strides[1] + column * 2;
    if (columns > 0) note_read(from, size_t(columns) * 2);
    for (int c = 0; c < columns; ++c) {
      memcpy(&image[size_t(shared_index(rows, r, c))], from + c * 2, 2);
    }
  }
  check_shared("a swizzled box", shared, 1024);
  bulk_copy_to_shared(shared, image.data(), uint32_t(image.size() * 2), barrier);
}

}  // namespace specextend::emulation

using namespace specextend::emulation;

namespace {

// Holds the arguments of all calls, [n, 9]: address, sizes, strides, rows of the box.
std::vector<uint64_t> all_maps;

}  // namespace

// Takes what the driver takes, as far as the kernels' boxes are concerned.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  bool fits =
      type == CU_TENSOR_MAP_DATA_TYPE_UINT16 && rank == 4 &&
      interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
      fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && reinterpret_cast<uintptr_t>(map) % 64 == 0 &&
      reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] == 64 && box[2] == 1 && box[3] == 1;
  for (int i = 0; i < 4; ++i) {
    fits &= sizes[i] > 0 && sizes[i] <= uint64_t(1) << 32 && box[i] > 0 && box[i] <= 256 &&
            element_strides[i] == 1;
  }
  for (int i = 0; i < 3; ++i) fits &= strides[i] % 16 == 0 && strides[i] < uint64_t(1) << 40;
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  const Map m{static_cast<const char*>(data),
              {sizes[0], sizes[1], sizes[2], sizes[3]},
              {2, strides[0], strides[1], strides[2]},
              box[1]};
  memcpy(map, &m, sizeof(m));
  all_maps.push_back(reinterpret_cast<uintptr_t>(data));
  all_maps.insert(all_maps.end(), sizes, sizes + 4);
  all_maps.insert(all_maps.end(), strides, strides + 3);
  all_maps.push_back(box[1]);
  return CUDA_SUCCESS;
}

// Called from Python: moves those of up to `most` maps to `to` and gives their number.
extern "C" __attribute__((visibility("default"))) int specextend_emulation_maps(uint64_t* to,
                                                                                int most) {
  const size_t count = std::min(all_maps.size(), size_t(most) * 9);
  std::copy_n(all_maps.begin(), count, to);
  all_maps.clear();
  return int(count / 9);
}
