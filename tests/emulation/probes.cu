// Has the kernels of tests/test_emulation.py: each is about one thing that kernels do, most of them
// with a fault that can be switched on.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"

namespace specextend {

constexpr unsigned kFull = 0xffffffffu;

struct Probe {
  int* out;
  const int* in;
  int count, fault;  // fault 0: none
};

__global__ void indices(Probe p) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  p.out[block * threads + thread] = block * 1000 + thread;
}

// out [13, 32]: what each lane got.
__global__ void warp_functions(Probe p) {
  const int lane = threadIdx.x, value = p.in[lane];
  int at = lane;
  const auto put = [&](int result) {
    p.out[at] = result;
    at += 32;
  };
  put(__shfl_sync(kFull, value, lane * 7));
  put(__shfl_sync(kFull, value, 5, 8));
  put(__shfl_xor_sync(kFull, value, 9));
  put(__shfl_up_sync(kFull, value, 3));
  put(__shfl_up_sync(kFull, value, 3, 8));
  put(__shfl_down_sync(kFull, value, 3));
  put(__shfl_down_sync(kFull, value, 3, 8));
  put(int(__ballot_sync(kFull, value % 3 == 0)));
  put(__any_sync(kFull, value == p.in[31]) * 2 + __all_sync(kFull, value >= 0));
  put(int(__match_any_sync(kFull, value % 3)));
  put(int(__reduce_add_sync(kFull, unsigned(value))));
  put(__reduce_max_sync(kFull, value) - __reduce_min_sync(kFull, value));
  // The two halves meet apart.
  put(lane < 16 ? __shfl_xor_sync(0x0000ffffu, value, 1) : __shfl_xor_sync(0xffff0000u, value, 2));
}

__global__ void warp_faults(Probe p) {
  const int lane = threadIdx.x;
  int value = p.in[lane];
  if (p.fault == 1 && lane == 7) return;
  if (p.fault == 2 && lane < 16) {
    value = __shfl_xor_sync(kFull, value, 1);
  } else if (p.fault == 2) {
    value = __shfl_xor_sync(kFull, value, 1);
  }
  if (p.fault == 3) value = __shfl_sync(0xffff0000u, value, 16);
  if (p.fault == 4 && lane < 8) value = __shfl_sync(0xffu, value, 8);
  if (p.fault == 5 && lane != 3) __syncwarp(~(1u << 3));
  p.out[lane] = __shfl_xor_sync(p.fault == 5 && lane == 3 ? 0x0000ffffu : kFull, value, 1);
}

// out: the block's values in reverse order. Faults: 1 no barrier before, 2 none behind.
__global__ void reverse(Probe p) {
  int* const values = reinterpret_cast<int*>(ptx::shared_memory());
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = p.in[threadIdx.x] + round;
    if (p.fault != 1) __syncthreads();
    p.out[round * blockDim.x + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
    if (p.fault != 2) __syncthreads();
  }
}

// The same within a warp. Fault 1: no barrier.
__global__ void reverse_warp(Probe p) {
  int* const values = reinterpret_cast<int*>(ptx::shared_memory());
  values[threadIdx.x] = p.in[threadIdx.x];
  if (p.fault != 1) __syncwarp();
  p.out[threadIdx.x] = values[31 - threadIdx.x];
}

// The first warp writes what the other two read, a half each. Fault 1: they do not meet.
__global__ void producer(Probe p) {
  int* const values = reinterpret_cast<int*>(ptx::shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, threads = p.fault == 1 ? 32 : 64;
  if (warp == 0) {
    for (int half = 0; half < 2; ++half) {
      values[32 * half + lane] = p.in[32 * half + lane];
      ptx::named_barrier(1 + half, threads);
    }
  } else {
    ptx::named_barrier(p.fault == 1 ? 2 + warp : warp, threads);
    p.out[32 * (warp - 1) + lane] = values[32 * (warp - 1) + 31 - lane];
  }
}

__global__ void block_votes(Probe p) {
  const int value = p.in[threadIdx.x];
  p.out[threadIdx.x] = __syncthreads_count(value > 3) * 4 + __syncthreads_or(value == 5) * 2 +
                       __syncthreads_and(value >= 0);
}

// Faults: 1 some threads have ended, 2 they are at another place, 3 a barrier too few in a warp,
// 4 a barrier without end.
__global__ void block_faults(Probe p) {
  if (p.fault == 1 && threadIdx.x >= 40) return;
  if (p.fault == 2) {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (p.fault == 3 && threadIdx.x == 5) __syncwarp();
  if (p.fault == 4) ptx::named_barrier(1, 128);
  __syncthreads();
  p.out[threadIdx.x] = 1;
}

// in[0]: byte of shared memory. Faults: 1 it is written, 2 read.
__global__ void shared_access(Probe p) {
  unsigned char* const shared = ptx::shared_memory();
  if (p.fault == 1) shared[p.in[0]] = 1;
  if (p.fault == 2) p.out[0] = shared[p.in[0]];
  if (p.fault == 0) p.out[0] = *reinterpret_cast<int*>(shared + p.in[0]);
}

__global__ void global_access(Probe p) {
  if (p.fault == 1) p.out[0] = p.in[p.count];
  if (p.fault == 2) p.out[p.count] = 1;
  if (p.fault == 3) p.out[0] = p.in[-1];
  if (p.fault == 4) p.out[0] = int(__ldg(reinterpret_cast<const int64_t*>(p.in + 1)));
  if (p.fault == 5) p.out[0] = p.count / p.in[0];
  if (p.fault == 6) p.out[-1] = 1;
  if (p.fault == 7) p.out[0] = int(*reinterpret_cast<const int64_t*>(p.in + 1));
  if (p.fault == 8) p.out[0] = 1 << p.count * 2;
  int values[4] = {1, 2, 3, 4};
  if (p.fault == 9) p.out[0] = values[p.count];
  if (p.fault == 10) __trap();
}

__device__ __attribute__((noinline)) int deep(volatile int* p, int depth) {
  volatile int here[256];
  here[depth % 256] = *p;
  return depth == 0 ? here[0] : deep(p, depth - 1) + here[depth % 256];
}

__global__ void stack(Probe p) { p.out[0] = deep(p.out, p.count); }

// Rows of 16 bytes, through two buffers. Faults: 1 no wait, 2 the wait covers a group too few, 3 no
// barrier behind the wait, 4 the buffer is filled again too soon, 5 and 6 misaligned, 7 outside.
__global__ void copies(Probe p) {
  unsigned char* const shared = ptx::shared_memory();
  const int thread = threadIdx.x, threads = blockDim.x;
  const auto fetch = [&](int row) {
    unsigned char* to = shared + ((row % 2) * threads + thread) * 16;
    const int* from = p.in + (row * threads + thread) * 4;
    if (p.fault == 5) to += 8;
    if (p.fault == 6) ++from;
    if (p.fault == 7) to += 2 * threads * 16;
    ptx::cp_async_16(to, from, row < p.count);
    ptx::cp_async_commit();
  };
  fetch(0);
  for (int row = 0; row <= p.count; ++row) {
    fetch(row + 1);
    if (p.fault == 2) {
      ptx::cp_async_wait<2>();
    } else if (p.fault != 1) {
      ptx::cp_async_wait<1>();
    }
    if (p.fault != 3) __syncthreads();
    const int other = threads - 1 - thread;
    memcpy(p.out + (row * threads + thread) * 4, shared + ((row % 2) * threads + other) * 16, 16);
    if (p.fault != 4) __syncthreads();
  }
}

// out (float) [16, 8] = a [16, 16] b [16, 8]; in: a by rows, then b by columns. Fault 1: b by rows.
template <typename T>
__global__ void multiply(Probe p) {
  auto* const shared = reinterpret_cast<int*>(ptx::shared_memory());
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 24 / 2; i += 32) shared[i] = p.in[i];
  __syncwarp();
  const auto* const a = reinterpret_cast<const T*>(shared);
  const T* const b = a + 16 * 16;
  uint32_t x[4], y[4];
  ptx::ldmatrix_x4(x, a + lane % 16 * 16 + lane / 16 * 8);
  if (p.fault == 0) {  // [8 columns, 16]: two matrices, given twice
    ptx::ldmatrix_x4(y, b + lane % 8 * 16 + lane / 8 % 2 * 8);
  } else {  // [16, 8]
    ptx::ldmatrix_x4_trans(y, b + lane % 16 * 8);
  }
  float d[4] = {};
  for (int i = 0; i < p.count; ++i) ptx::mma_m16n8k16<T>(d, x, y[0], y[1]);
  auto* const out = reinterpret_cast<float*>(p.out) + blockIdx.x * 128;
  for (int i = 0; i < 4; ++i) out[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = d[i];
}

// The last block to come adds up what all have written; of one thread. Faults: 1 the last block of
// the grid does, 2 no fence before the ticket, 3 none behind.
__global__ void last_arriver(Probe p) {
  p.out[1 + blockIdx.x] = p.in[blockIdx.x];
  if (p.fault != 2) __threadfence();
  const unsigned ticket =
      atomicInc(reinterpret_cast<unsigned*>(p.out) + gridDim.x + 1, gridDim.x - 1);
  if (p.fault == 1 ? blockIdx.x != gridDim.x - 1 : ticket != gridDim.x - 1) return;
  if (p.fault != 3) __threadfence();
  int sum = 0;
  for (int i = 0; i < int(gridDim.x); ++i) sum += p.out[1 + i];
  p.out[0] = sum;
}

// out: the block's values, reversed through memory that is its own. Fault 1: the blocks share it.
__global__ void scratch(Probe p) {
  const int threads = blockDim.x, block = blockIdx.x;
  int* const own = p.out + (gridDim.x + (p.fault == 1 ? 0 : block)) * threads;
  own[threadIdx.x] = p.in[block * threads + threadIdx.x];
  __syncthreads();
  p.out[block * threads + threadIdx.x] = own[threads - 1 - threadIdx.x];
}

// out[0]: the least of in. Fault 1: who finds a smaller one writes it.
__global__ void minimum(Probe p) {
  const int value = p.in[threadIdx.x];
  if (p.fault == 0) {
    atomicMin(p.out, value);
  } else if (value < p.out[0]) {
    p.out[0] = value;
  }
}

// out: in + 1, through shared memory by bulk copies. Faults: 1 the mbarrier's initialisation is not
// fenced, 2 nobody waits for it, 3 nobody waits for the copy, 4 not all do, 5 what threads have
// stored is not fenced for the copy, 6 the copy does not wait for them.
__global__ void bulk_copies(Probe p) {
  int* const values = reinterpret_cast<int*>(ptx::shared_memory());
  auto* const loaded = reinterpret_cast<uint64_t*>(values + blockDim.x);
  const uint32_t bytes = blockDim.x * sizeof(int);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(loaded, 1);
    if (p.fault != 1) ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(loaded, bytes);
    ptx::bulk_copy_to_shared(values, p.in, bytes, loaded);
  }
  if (p.fault != 2) __syncthreads();
  const bool waits = p.fault == 4 ? threadIdx.x == 0 : p.fault != 3;
  while (waits && !ptx::mbarrier_try_wait_parity(loaded, 0)) {
  }
  values[threadIdx.x] += 1;
  if (p.fault != 5) hopper::publish_shared();
  if (p.fault != 6) __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_copy_to_global(p.out, values, bytes);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group<0>();
  }
}

// Launched so that it may begin early. Faults: 1 some threads end without a wait, 2 they write
// before it.
__global__ void early(Probe p) {
  if (p.fault == 1 && threadIdx.x >= 20) return;
  if (p.fault == 2) p.out[threadIdx.x] = 1;
  ptx::wait_for_predecessors();
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

// Fault 1: waits for all blocks; 2: without asking.
__global__ void wait_for_blocks(Probe p) {
  atomicAdd(p.out, 1);
  if (p.fault == 1) {
    while (atomicAdd(p.out, 0) < int(gridDim.x)) {
    }
  }
}

__global__ void histogram(Probe p) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread < p.count) atomicAdd(p.out + p.in[thread], 1);
  atomicMax(p.out + 8, thread);
  atomicMin(p.out + 9, thread);
  atomicOr(p.out + 10, 1 << thread % 8);
  if (atomicCAS(p.out + 11, 0, thread + 1) == 0) atomicExch(p.out + 12, thread + 1);
}

// in: floats; out: half and bfloat16 bits of each, side by side; then floats of the half bits i.
__global__ void convert(Probe p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.count) {
    const float x = __int_as_float(p.in[i]);
    p.out[i] = __half_as_ushort(__float2half_rn(x)) | __bfloat16_as_ushort(__float2bfloat16_rn(x))
                                                          << 16;
  }
  if (i < 65536) {
    const float x = __half2float(__ushort_as_half(static_cast<unsigned short>(i)));
    p.out[p.count + i] = __float_as_int(x);
  }
}

struct Named {
  const char* name;
  void (*kernel)(Probe);
};

const Named kKernels[] = {
    {"indices", indices},
    {"warp_functions", warp_functions},
    {"warp_faults", warp_faults},
    {"reverse", reverse},
    {"reverse_warp", reverse_warp},
    {"producer", producer},
    {"block_votes", block_votes},
    {"block_faults", block_faults},
    {"shared_access", shared_access},
    {"global_access", global_access},
    {"stack", stack},
    {"copies", copies},
    {"multiply_half", multiply<__half>},
    {"multiply_bfloat16", multiply<__nv_bfloat16>},
    {"last_arriver", last_arriver},
    {"scratch", scratch},
    {"minimum", minimum},
    {"bulk_copies", bulk_copies},
    {"early", early},
    {"wait_for_blocks", wait_for_blocks},
    {"histogram", histogram},
    {"convert", convert},
};

}  // namespace specextend

// Called from Python; says what went wrong, or gives null.
extern "C" __attribute__((visibility("default"))) const char* specextend_probe(
    const char* name, const unsigned* grid, const unsigned* block, size_t shared_bytes, int* out,
    const int* in, int count, int fault) {
  using namespace specextend;
  for (const Named& k : kKernels) {
    if (strcmp(k.name, name) != 0) continue;
    const cudaError_t error = launch_early(
        k.kernel == early, k.kernel, dim3(grid[0], grid[1], grid[2]),
        dim3(block[0], block[1], block[2]), shared_bytes, nullptr, Probe{out, in, count, fault});
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  return "no such probe";
}
