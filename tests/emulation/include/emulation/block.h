#pragma once

// Declares what the stand-in headers ask of the thread block that runs (block.cpp). A thread is a
// fiber: it runs until it waits for others, and the schedule then says who is next.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

// The last parameters of whatever threads do together: the place in the kernel that calls it.
#define SPECEXTEND_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace specextend::emulation {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxCluster = 2;                  // blocks
constexpr size_t kMaxSharedBytes = 227 * 1024;  // a block may have so many
constexpr unsigned char kPoison = 0xff;         // it makes every element a NaN, every integer -1

enum class Kind : int { kRandom, kAhead, kBehind };

// Says how the next launches run.
struct Settings {
  uint64_t seed = 0;
  Kind kind = Kind::kRandom;
  int multiprocessors = 4;
  int capability = 80;  // ten times major plus minor
};
extern Settings settings;

// Runs a grid: body(argument) in every thread. What went wrong, if anything, is in last_error().
cudaError_t run_grid(const void* kernel, const cudaLaunchConfig_t& config, void (*body)(void*),
                     void* argument);
const std::string& last_error();

// --- for the thread that runs ---

// Ends the launch with an error that names kernel, block and thread.
[[noreturn]] void fail(const std::string& what);

unsigned lane();

// Gives its index in the block; in a cluster, those of the next block follow.
int thread();

// Draws a number of the schedule, below `bound`.
unsigned draw(unsigned bound);

// Lets another thread run, as one does that polls for others. Gives the number of calls since the
// block last got anywhere; too many are an error.
int yield();

// Waits until all threads of the warp that `mask` names come to this place; the last one calls
// run(operands, mask), operands[i] being that of lane i.
void warp_call(const char* name, const char* file, int line, unsigned mask, void* operand,
               void (*run)(void* const* operands, unsigned mask));

// Waits until `threads` threads of the block have come to barrier `id`, all at one place of the
// kernel if `uniform`, and gives the sum of their values.
int barrier(const char* name, const char* file, int line, int id, int threads, bool uniform,
            int value);

// Waits for all threads of the cluster.
void cluster_barrier(const char* name, const char* file, int line);

// Say which block of its cluster runs, and what lies in block `rank` where `p` lies in its shared
// memory.
int cluster_rank();
void* in_cluster(void* p, int rank);

unsigned char* shared_memory();

// Fails unless [p, p + bytes) lies in shared memory and p is a multiple of `bytes`.
void check_shared(const char* what, const void* p, size_t bytes);

// --- order (races.cpp) ---

// Lets the lanes of the caller's warp that `mask` names know what the others did until now.
void order_lanes(unsigned mask);
void note_atomic(const void* p, size_t bytes);
void thread_fence();
void wait_for_predecessors();
// Makes what the thread has stored to shared memory visible to tensor cores and copies.
void publish_shared();

// --- tensor cores (tensor_cores.cpp) ---

void ldmatrix(uint32_t* r, const void* row, bool transposed, const char* file, int line);
void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat16, const char* file,
         int line);

// --- products and copies of Hopper: the functions of hopper.cuh (hopper.cpp) ---

void multiply_queries(float* s, const void* q, const void* k, int keys, int dim, bool bfloat16,
                      const char* file, int line);
void multiply_values(float* o, const void* p, const void* v, int keys, int dim, bool bfloat16,
                     const char* file, int line);
void wait_products(int pending, const char* file, int line);
// `at` has column, row, head, batch.
void copy_box(void* shared, const CUtensorMap& map, uint64_t* barrier, const int (&at)[4]);

// --- copies: the functions of ptx.cuh of the same names (copies.cpp) ---

void cp_async_16(void* shared, const void* global, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);

void mbarrier_init(uint64_t* barrier, uint32_t count);
void fence_mbarrier_init();
void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes);
bool mbarrier_try_wait_parity(uint64_t* barrier, uint32_t parity);

void bulk_copy_to_shared(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void bulk_copy_to_global(void* global, const void* shared, uint32_t bytes);
void bulk_commit_group();
void bulk_wait_group(int pending, bool only_read);

}  // namespace specextend::emulation
