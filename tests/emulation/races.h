#pragma once

// Which accesses to memory are in order: by what threads do to be in order, not by the turns that
// they happened to take. (A vector clock for every thread, as in FastTrack, Flanagan and Freund
// 2009.) Watched are shared memory and the tensors of guarded_memory.cpp.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace specextend::emulation {

// Until when a thread knows of the others' accesses: of threads, and behind them of mbarriers, for
// which copies write.
using Times = std::vector<uint32_t>;

// Of what either knows of: into `times`, which may be empty.
void add_times(Times& times, const Times& more);

constexpr int kMaxMbarriers = 128;  // of a cluster

// --- the scheduler tells ---

void begin_grid_accesses(bool early);
// Of a block, or a cluster; `number` tells it from others of the grid.
void begin_block_accesses(int threads, unsigned number);
// This thread runs; another one will.
void begin_turn(int thread);
void end_turn();
// These threads have met: each knows what the others did before.
void order_threads(const std::vector<int>& threads);
// At the end of the thread that runs.
void check_has_waited();

// --- the thread that runs ---

void note_read(const void* p, size_t bytes);
void note_write(const void* p, size_t bytes);

// What it did until now goes into `times`; what they hold is known to it from now on.
void release_into(Times& times);
void acquire_from(const Times& times);

// A copy that it asked for and has not waited for yet: nobody may touch the place, nor may it.
void begin_copy_write(const void* p, size_t bytes);
void end_copy_write(const void* p, size_t bytes);

// Reads of tensor cores and of copies: stores to shared memory have to be fenced for them.
void note_engine_read(const void* p, size_t bytes);
// A copy for the mbarrier of this number, in this phase of it.
void note_bulk_copy(const void* to, const void* from, size_t bytes, int mbarrier, uint32_t phase);
// Who acquires `times` knows of the copies for the mbarrier up to this phase.
void set_phase_over(Times& times, int mbarrier, uint32_t phase);

// A use of an mbarrier, which needs to have been made before.
void check_mbarrier_is_there(const void* p);

}  // namespace specextend::emulation
